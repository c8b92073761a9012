"""Reads GGUF files: their metadata, and their tensors, which stay on disk until they are used.

`gguf.GGUFReader` trusts every length that a file states: one damaged byte makes it loop for hours, or read a tensor from
another one's bytes. Here each length and offset is checked against the file, and a file of the other byte order, whose
quantised blocks that reader does not swap, is refused.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recyc_jax.loading import gguf_fields

_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 4
_LONGEST_KEY, _LONGEST_NAME = 256, 64  # llama.cpp's tensors have names below 64 bytes
_ALIGNMENT = "general.alignment"
_STRING, _ARRAY, _BOOL, _FLOAT32 = 8, 9, 7, 6  # GGUF's codes of the types of metadata
_NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "<u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}


class Tensor(NamedTuple):
    """A tensor of a GGUF file."""

    name: str
    kind: Any  # a gguf.GGMLQuantizationType
    shape: tuple[int, ...]  # in numpy's order, the reverse of the file's
    data: np.ndarray  # the bytes, in rows
    file: Path


class Contents(NamedTuple):
    """What a GGUF file holds: a value for each key, and the tensors in the file's order."""

    fields: dict[str, Any]
    tensors: list[Tensor]


def read(file: Path) -> Contents:
    """The contents of one GGUF file. Raises ValueError, naming the file, if it is damaged, incomplete, big-endian or of
    an unknown version."""
    try:
        data = np.memmap(file, mode="r")
        cursor = _Cursor(data)
        tensor_count, field_count = _header(cursor)
        fields = _fields(cursor, field_count)
        return Contents(fields, _tensors(cursor, tensor_count, fields, data, file))
    except (ValueError, OSError) as error:
        raise ValueError(f"{file}: not a complete GGUF file ({error})") from None


class _Cursor:
    """Reads a file's bytes from front to back."""

    def __init__(self, data: np.ndarray) -> None:
        self._data = data.data  # slices of it are no copies
        self.at = 0

    def take(self, count: int) -> memoryview:
        """The next `count` bytes. Raises ValueError if the file ends before them."""
        begin, self.at = self.at, self.at + count
        if self.at > len(self._data):
            raise ValueError(f"it ends within its header, at byte {len(self._data)}")
        return self._data[begin : self.at]

    def number(self, layout: str) -> int:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def text(self) -> str:
        try:
            return str(self.take(self.number("<Q")), "utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"the text that ends at byte {self.at} is not UTF-8") from None

    def name(self, longest: int) -> str:
        """The name of a field or tensor, which messages can hold. Raises ValueError for what is none."""
        found = self.text()
        if len(found) > longest or not found.isprintable():
            raise ValueError(f"the name that ends at byte {self.at} is too long or cannot be printed")
        return found

    def value(self, kind: int) -> Any:
        """A value of metadata. Raises ValueError for an unknown type."""
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            kind, count = self.number("<I"), self.number("<Q")
            return [self.text() for _ in range(count)] if kind == _STRING else self._numbers(kind, count)
        (number,) = self._numbers(kind, 1)
        # a float32's shortest form: 1e-05 would otherwise become 9.999999747378752e-06
        return float(str(np.float32(number))) if kind == _FLOAT32 else number

    def _numbers(self, kind: int, count: int) -> list[Any]:
        if kind not in _NUMBERS:
            raise ValueError(f"the type {kind} at byte {self.at} is unknown")
        layout = np.dtype(_NUMBERS[kind])
        found = np.frombuffer(self.take(count * layout.itemsize), layout)
        return (found.astype(bool) if kind == _BOOL else found).tolist()


def _header(cursor: _Cursor) -> tuple[int, int]:
    """The numbers of tensors and of fields. Raises ValueError for what is no GGUF file of a known version."""
    if bytes(cursor.take(4)) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = cursor.number("<I")
    if version >= 1 << 16:  # the bytes of a small number, the other way round
        raise ValueError(
            "it is big-endian, which is not supported; gguf-convert-endian makes a copy of it little-endian"
        )
    if version not in _VERSIONS:
        raise ValueError(f"it has GGUF's version {version}, which is not supported; 2 and 3 are")
    return cursor.number("<Q"), cursor.number("<Q")


def _fields(cursor: _Cursor, count: int) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.name(_LONGEST_KEY)
        if key in fields:
            raise ValueError(f"the key {key!r} is there twice")
        fields[key] = cursor.value(cursor.number("<I"))
    return fields


def _tensors(cursor: _Cursor, count: int, fields: dict[str, Any], data: np.ndarray, file: Path) -> list[Tensor]:
    headers: dict[str, tuple[list[int], int, int]] = {}
    for _ in range(count):
        name, rank = cursor.name(_LONGEST_NAME), cursor.number("<I")
        if name in headers:
            raise ValueError(f"the tensor {name!r} is there twice")
        if not 1 <= rank <= _MOST_DIMENSIONS:
            raise ValueError(f"the tensor {name!r} has {rank} dimensions")
        sizes = [cursor.number("<Q") for _ in range(rank)]
        headers[name] = (sizes, cursor.number("<I"), cursor.number("<Q"))
    alignment = _alignment(fields)
    begin = end = _aligned(cursor.at, alignment)
    tensors = []
    for name, (sizes, kind, offset) in headers.items():
        # every writer puts each tensor behind the one before it; llama.cpp insists on that as well
        if begin + offset != _aligned(end, alignment):
            raise ValueError(f"the tensor {name!r} does not begin where the one before it ends")
        tensor = _tensor(name, kind, tuple(reversed(sizes)), data[begin + offset :], file)
        tensors.append(tensor)
        end = begin + offset + tensor.data.nbytes
    return tensors


def _alignment(fields: dict[str, Any]) -> int:
    import gguf

    alignment = gguf_fields.whole(fields, _ALIGNMENT, gguf.GGUF_DEFAULT_ALIGNMENT, least=1)
    if alignment & (alignment - 1):
        raise ValueError(f"{_ALIGNMENT}={alignment} is not a power of two")
    return alignment


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _tensor(name: str, code: int, shape: tuple[int, ...], rest: np.ndarray, file: Path) -> Tensor:
    """A tensor whose bytes are the first of `rest`."""
    import gguf

    try:
        kind = gguf.GGMLQuantizationType(code)
        rows = gguf.quants.quant_shape_to_byte_shape(shape, kind)
    except ValueError as error:
        raise ValueError(f"the tensor {name!r}: {error}") from None
    size = math.prod(rows)
    if size > len(rest):
        raise ValueError(f"it ends within the tensor {name!r}")
    return Tensor(name, kind, shape, rest[:size].reshape(rows), file)
