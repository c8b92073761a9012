"""GGUF files that llama.cpp's gguf-split cut in parts, which are named NAME-00001-of-00003.gguf and so on."""

from __future__ import annotations

import re
from pathlib import Path

from recyc_jax.loading import gguf_fields, gguf_file

_NAME = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})")


def parts(file: Path) -> list[Path]:
    """The files that the model of `file` lies in, in their order: all parts of a model that was cut, of which any may be
    given, else the file alone. Raises ValueError naming the first part that is missing."""
    named = _NAME.fullmatch(file.stem)
    if named is None or int(named[3]) < 2:
        return [file]
    count = int(named[3])
    files = []
    for number in range(1, count + 1):
        files.append(file.with_name(f"{named[1]}-{number:05}-of-{count:05}{file.suffix}"))
        if not files[-1].is_file():
            if _count(file, gguf_file.read(file)) < 2:  # a whole model that has such a name
                return [file]
            raise ValueError(f"{file}: part {number} of {count} is missing: {files[-1]}")
    return files


def name(file: Path) -> str:
    """The file's name without its ending and without the number of the part."""
    named = _NAME.fullmatch(file.stem)
    return named[1] if named else file.stem


def read(files: list[Path]) -> gguf_file.Contents:
    """The metadata of the first part and the tensors of all. Raises ValueError, naming the file, where a part is not
    what its name says, or where the parts are not those of one model."""
    read_parts = [gguf_file.read(file) for file in files]
    fields = read_parts[0].fields
    tensors: dict[str, gguf_file.Tensor] = {}
    for number, (file, part) in enumerate(zip(files, read_parts, strict=True)):
        _check_part(file, part, number, len(files))
        differing = [
            key for key in part.fields if key != "split.no" and part.fields[key] != fields.get(key, part.fields[key])
        ]
        if differing:
            raise ValueError(f"{file}: {differing[0]} is not what {files[0].name} says: a part of another model")
        for tensor in part.tensors:
            if tensor.name in tensors:
                raise ValueError(f"{file}: the tensor {tensor.name!r} is in {tensors[tensor.name].file.name} as well")
            tensors[tensor.name] = tensor
    expected = fields.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        where = f"the {len(files)} parts hold" if len(files) > 1 else "it holds"
        said = gguf_fields.shown("split.tensors.count", expected)
        raise ValueError(f"{files[0]}: {said}, but {where} {len(tensors)} tensors")
    return gguf_file.Contents(fields, list(tensors.values()))


def _check_part(file: Path, part: gguf_file.Contents, number: int, count: int) -> None:
    said = _count(file, part)
    if count == 1 and said > 1:
        raise ValueError(
            f"{file}: split.count={said}, so it is one part of several, but it is not named NAME-00001-of-{said:05}.gguf"
        )
    if count > 1 and said != count:
        raise ValueError(f"{file}: split.count={said}, but the name says that it is one part of {count}")
    if count > 1 and part.fields.get("split.no") != number:
        said_number = gguf_fields.shown("split.no", part.fields.get("split.no"))
        raise ValueError(f"{file}: {said_number}, counted from 0, but the name says part {number + 1}: it was renamed")


def _count(file: Path, part: gguf_file.Contents) -> int:
    """The number of parts that the file says its model has; 0 or 1 if it is whole."""
    try:
        return gguf_fields.whole(part.fields, "split.count", 0)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
