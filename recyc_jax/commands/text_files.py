"""Texts in users' files: plain text, JSON lines (plain or gzip) and parquet, read one document at a time.

Of a row, only the text's column is looked at. A file is read by its exact path."""

from __future__ import annotations

import codecs
import gzip
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

COLUMNS = ("text", "content", "document")
_PLAIN, _ROWS, _PARQUET = (".txt", ".md", ".tex"), (".jsonl", ".ndjson", ".json"), (".parquet",)


class Document(NamedTuple):
    name: str
    text: str


def is_text_file(path: Path) -> bool:
    """Whether a folder's file is read, by its suffix: .txt, .md, .tex, .jsonl, .ndjson, .json (each also with .gz) or
    .parquet."""
    return path.is_file() and _kind(path) in (*_PLAIN, *_ROWS, *_PARQUET)


def read(path: Path, column: str | None = None) -> Iterator[Document]:
    """The documents of a file, empty ones included: one of a plain text, one per row of others. The text is in the
    named column, or in the first of `text`, `content` and `document` that a row has. Raises ValueError that names file
    and row for what cannot be read."""
    kind = _kind(path)
    try:
        if kind in _PARQUET:
            yield from _parquet(path, column)
        elif kind in _ROWS:
            yield from _json_rows(path, column)
        elif column is not None:
            raise ValueError(f"{path} is plain text: it has no column {column!r}")
        else:
            with _opened(path) as file:
                yield Document(path.name, decoded(file.read(), str(path)))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: not a complete gzip file ({error})") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None


def decoded(data: bytes, where: str) -> str:
    """The text of bytes in UTF-8, or in UTF-16 where a byte-order mark says so; the mark is no part of the text. Raises
    ValueError that begins with `where`."""
    encoding = "utf-8-sig"
    if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        encoding = "utf-32"
    elif data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: cannot be read as UTF-8 text ({error})") from None
    if "\0" in text:
        raise ValueError(
            f"{where}: cannot be read as UTF-8 text (it holds null characters: another encoding, or damaged)"
        )
    return text


def whole(text: str) -> str:
    """The text with U+FFFD for each unpaired surrogate, which no encoding can represent."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _kind(path: Path) -> str:
    return (Path(path.stem).suffix if path.suffix.lower() == ".gz" else path.suffix).lower()


def _opened(path: Path) -> Any:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def _json_rows(path: Path, column: str | None) -> Iterator[Document]:
    """The rows of JSON lines, or of a JSON array or object that fills the file."""
    number = 0
    for number, row in enumerate(_json_values(path)):
        yield Document(f"row {number}", _text_of(row, column, f"{path}:{number + 1}"))


def _json_values(path: Path) -> Iterator[Any]:
    with _opened(path) as file:
        head = file.read(64)
        marked = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        if marked or head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
            yield from _json_whole(path, decoded(head + file.read(), str(path)))
            return
        file.seek(0)
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                yield _value(line)
            except (ValueError, RecursionError) as error:
                if number == 1 and line.strip() == b"{":  # an object over several lines
                    yield from _json_whole(path, decoded(line + file.read(), str(path)))
                    return
                if _is_torn(line, error):
                    print(f"{path}:{number}: the last line is torn and is passed over", file=sys.stderr, flush=True)
                    return
                raise ValueError(f"{path}:{number}: not JSON ({error})") from None


def _is_torn(line: bytes, error: Exception) -> bool:
    """Whether a line that is not JSON is the beginning of an object, as a writer that was killed leaves it."""
    if line.endswith(b"\n") or not line.lstrip().startswith(b"{"):
        return False
    if isinstance(error, UnicodeDecodeError):
        return error.reason == "unexpected end of data"
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos >= len(error.doc.rstrip())


def _value(text: str | bytes) -> Any:
    """The JSON value of a text; whole numbers are read as floats, because Python refuses those of many digits."""
    return json.loads(text, parse_int=float)


def _json_whole(path: Path, text: str) -> Iterator[Any]:
    """The values of a text that holds one JSON value, or one in each line; the items of an array."""
    try:
        found = _value(text)
    except (ValueError, RecursionError) as error:
        lines = [line for line in text.split("\n") if line.strip()]
        if len(lines) < 2 or text.lstrip().startswith("["):
            raise ValueError(f"{path}: cannot be read as JSON ({error})") from None
        for number, line in enumerate(lines, 1):
            try:
                yield _value(line)
            except (ValueError, RecursionError) as inner:
                raise ValueError(f"{path}:{number}: not JSON ({inner})") from None
        return
    yield from found if isinstance(found, list) else [found]


def _text_of(row: Any, column: str | None, where: str) -> str:
    """The first text of a row that is not empty; empty if it has none. Raises ValueError if that is no string."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row must be a JSON object, not a {type(row).__name__}")
    names = COLUMNS if column is None else (column,)
    name = next((name for name in names if row.get(name)), None)
    if name is None:
        if column is not None and column not in row:
            raise ValueError(f"{where}: there is no column {column!r}; it has {', '.join(map(str, row)) or 'none'}")
        return ""
    if not isinstance(row[name], str):
        kind = {dict: "an object", list: "a list", bool: "a boolean", float: "a number"}[type(row[name])]
        raise ValueError(f"{where}: {name} must be a string, not {kind}")
    return whole(row[name])


def _parquet(path: Path, column: str | None) -> Iterator[Document]:
    import pyarrow
    from pyarrow import parquet

    try:
        with path.open("rb") as opened, parquet.ParquetFile(opened) as file:
            has = file.schema_arrow.names
            names = [name for name in (COLUMNS if column is None else (column,)) if name in has]
            if not names:
                wanted = repr(column) if column else "named text, content or document"
                raise ValueError(f"{path}: there is no column {wanted}; it has {', '.join(has) or 'none'}")
            for name in names:
                if has.count(name) > 1:
                    raise ValueError(f"{path}: it has two columns named {name}")
                kind = file.schema_arrow.field(name).type
                if pyarrow.types.is_dictionary(kind):
                    kind = kind.value_type
                if not any(check(kind) for check in (pyarrow.types.is_null, *_strings(pyarrow.types))):
                    raise ValueError(f"{path}: the column {name} must hold strings, not {kind}")
            number = 0
            for batch in file.iter_batches(64, columns=names):
                for row in batch.to_pylist():
                    yield Document(f"row {number}", _text_of(row, column, f"{path}, row {number}"))
                    number += 1
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as parquet ({_first_line(error)})") from None


def _strings(types: Any) -> list[Any]:
    """pyarrow's checks for columns of strings; older versions have no string views."""
    names = ("is_string", "is_large_string", "is_string_view")
    return [getattr(types, name) for name in names if hasattr(types, name)]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
