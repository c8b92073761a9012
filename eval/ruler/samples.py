"""Samples on disk, in the layout of NVIDIA/RULER: DIR/<length>/data/<task>/validation.jsonl."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from eval.ruler.tasks.base import Sample
from recyc_jax.commands.files import read_text, write_text
from recyc_jax.commands.text_files import whole


def _file(folder: Path, length: int, task: str) -> Path:
    return folder / str(length) / "data" / task / "validation.jsonl"


def write(
    folder: Path, length: int, task: str, samples: Iterable[Sample], overhead: int, count: Callable[[str], int]
) -> Path:
    """Write one task's samples and return the path of the file; `overhead` is the number of tokens that the model's
    template adds. Raises ValueError if the file cannot be written."""
    file = _file(folder, length, task)
    rows = []
    for sample in samples:
        row = {
            "index": sample.index,
            "input": sample.input,
            "outputs": list(sample.outputs),
            "length": sample.length - overhead,
            "length_w_model_temp": sample.length,
            "answer_prefix": sample.answer_prefix,
        }
        if task.startswith("niah"):
            row["token_position_answer"] = count(sample.input[: sample.input.index(sample.outputs[0])])
        rows.append(row)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    except OSError as error:
        raise ValueError(f"--dump-samples {folder}: {error.strerror}") from None
    return file


def read(
    folder: Path,
    length: int,
    task: str,
    limit: int,
    counts: Callable[[Sequence[str]], list[int]],
    new_tokens: int,
    longest: int | None,
) -> list[Sample]:
    """The first `limit` samples of a task.

    Samples without the field `answer_prefix` (RULER of 2024) have the prefix at the end of `input`. The sample's index
    is the row's number, because the reference overwrites the `index` field. Raises ValueError, naming file and line, if
    a row is malformed or takes more than `longest` tokens including its answer."""
    file = _file(folder, length, task)
    samples = []
    # not splitlines: JSON strings may hold U+2028
    lines = [line for line in read_text("--data:", file).split("\n") if line.strip()]
    for number, line in enumerate(lines[:limit]):
        where = f"--data: {file}:{number + 1}"
        try:
            row = json.loads(line)
            text, outputs, prefix = row["input"], row["outputs"], row.get("answer_prefix", "")
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{where}: not a sample ({type(error).__name__}: {error})") from None
        strings = isinstance(outputs, list) and outputs and all(isinstance(out, str) and out for out in outputs)
        if not (isinstance(text, str) and text and isinstance(prefix, str) and strings):
            raise ValueError(f"{where}: input and answer_prefix must be strings, outputs a list of non-empty strings")
        if any(whole(part) != part for part in (text, prefix, *outputs)):
            raise ValueError(f"{where}: holds an unpaired surrogate, which no tokenizer takes")
        samples.append(Sample(number, text, prefix, tuple(outputs), 0))
    if not samples:
        raise ValueError(f"--data: {file}: there is no sample in it")
    counted = []
    for sample, tokens in zip(samples, counts([sample.prompt for sample in samples]), strict=True):
        counted.append(dataclasses.replace(sample, length=tokens + new_tokens))
        if longest is not None and counted[-1].length > longest:
            raise ValueError(
                f"--data: {file}:{sample.index + 1}: {counted[-1].length} tokens with its answer exceed the model's "
                f"context of {longest}; pass --allow-beyond-context to run it all the same"
            )
    return counted
