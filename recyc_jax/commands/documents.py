"""Long documents for evaluation and training: from Debian packages, local files or datasets of the hub."""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from recyc_jax.commands import novels, text_files
from recyc_jax.commands.html_text import html_text
from recyc_jax.commands.text_files import Document
from recyc_jax.loading import fetch
from recyc_jax.loading.digests import file_digest


class Documents:
    """The documents of a domain that hold any text, read anew each time they are iterated over, so that a domain may be
    larger than memory."""

    def __init__(self, read: Callable[[], Iterator[Document]]) -> None:
        self._read = read
        self.empty = 0
        """Documents without any text, as counted by the last whole iteration."""

    def __iter__(self) -> Iterator[Document]:
        empty = 0
        for document in self._read():
            if document.text.strip():
                yield document
            else:
                empty += 1
        self.empty = empty

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Domain(NamedTuple):
    name: str
    documents: Documents
    source: str  # for reports
    fingerprint: str  # changes with the documents' content


def split(flag: str, text: str) -> list[str]:
    """The items of a comma-separated flag that `load` takes, without duplicates. A comma is a part of a path if what
    follows it is no item by itself. Raises ValueError if there are none."""
    items: list[str] = []
    for piece in text.split(","):
        if items and "=" in items[-1] and "=" not in piece and piece.strip() not in PACKAGED:
            items[-1] += f",{piece}"
        else:
            items.append(piece)
    items = [item.strip(" ").rstrip(",") for item in items if item.strip(" ,")]
    if not items:
        raise ValueError(f"{flag} is empty")
    return list(dict.fromkeys(items))


def load(spec: str, flag: str = "--domains") -> Domain:
    """The domain that an item of `flag` names.

    `spec` is `novels`, `essays` or `latex`, which come from Debian packages; `NAME=PATH` or `NAME=PATH:COLUMN` for a
    text, JSON-lines or parquet file or a folder of such files; `NAME=glob:PATTERN` for the files that match; or
    `NAME=DATASET`, `NAME=DATASET:CONFIG:SPLIT` or `NAME=DATASET:CONFIG:SPLIT:COLUMN` on the hub. Raises ValueError that
    says what is unavailable or unreadable; so does an iteration over the documents, naming file and row.
    """
    try:
        domain = _load(spec)
        if next(iter(domain.documents), None) is None:
            raise ValueError(f"{spec}: there is no text in it (rows need a column named text, content or document)")
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None
    return domain


def _load(spec: str) -> Domain:
    """`load` with error messages that do not name the flag."""
    name, given, where = spec.partition("=")
    if not given:
        if spec not in PACKAGED:
            raise ValueError(f"{spec!r} is unknown; there is {', '.join(PACKAGED)} (or NAME=PATH)")
        return PACKAGED[spec]()
    if not name or not where:
        raise ValueError(f"{spec}: a name must stand before the equals sign and a path behind it (NAME=PATH)")
    path, column = _path_and_column(where)
    if path is not None:
        return _local(name, path, column)
    if where.startswith("glob:"):
        files = sorted(Path(found) for found in glob.glob(where.removeprefix("glob:"), recursive=True))
        files = [file for file in files if file.is_file()]
        if not files:
            raise ValueError(f"{spec}: no file matches the pattern")
        return _files(name, {str(file): file for file in files}, None, f"{len(files)} files of {where}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[^:/]*){0,3}", where):
        return _hub(name, where)
    raise ValueError(f"{spec}: there is no such file or folder, and it is no dataset of the hub")


def _path_and_column(where: str) -> tuple[Path | None, str | None]:
    """The existing file or folder that `where` names, alone or with a column after its last colon."""
    path = Path(where).expanduser()
    if _exists(path):
        return path, None
    before, colon, column = where.rpartition(":")
    if colon and before and column and _exists(path := Path(before).expanduser()):
        return path, column
    return None, None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, or a folder that must not be read
        return False


# --- packages --------------------------------------------------------------------------------------------------------


def _novels() -> Domain:
    try:
        file = novels.fetched()
    except fetch.UnavailableError as error:
        raise _unavailable("novels", error) from None

    def read() -> Iterator[Document]:
        for number, text in enumerate(novels.texts(file), 1):  # the database has no titles
            yield Document(f"novel {number}", text)

    source = "six novels of Jane Austen (Debian package r-cran-janeaustenr, public domain)"
    return Domain("novels", Documents(read), source, file_digest(file))


def _essays() -> Domain:
    source = "An Anarchist FAQ (Debian package anarchism, GPL-2 or later, GFDL)"
    return _packaged("essays", source, "anarchism", "usr/share/doc/anarchism/html/*.html", html_text)


def _latex() -> Domain:
    source = "LaTeX manuals (Debian package texlive-lang-english, free licences of each)"
    pattern = "usr/share/doc/texlive-doc/**/*.tex*"
    return _packaged("latex", source, "texlive-lang-english", pattern, lambda text: text)


PACKAGED: dict[str, Callable[[], Domain]] = {"novels": _novels, "essays": _essays, "latex": _latex}


def _unavailable(domain: str, error: Exception) -> ValueError:
    return ValueError(f"{domain}: {error}; leave it out, or name texts of your own (NAME=PATH)")


def _packaged(domain: str, source: str, package: str, pattern: str, convert: Callable[[str], str]) -> Domain:
    """The .tex and .html files of a Debian package that match `pattern`, stored as compressed JSON lines in the cache
    folder."""

    def extract(files: Path, target: Path) -> None:
        rows = []
        for path in sorted(files.glob(pattern)):
            if path.is_file() and path.name.removesuffix(".gz").endswith((".tex", ".html")):
                data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
                text = convert(_decoded(data))
                rows.append({"name": path.name.removesuffix(".gz"), "text": text})
        with gzip.open(target, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    try:
        target = fetch.debian_extract(package, extract, fetch.cache_dir() / f"{domain}.jsonl.gz")
    except fetch.UnavailableError as error:
        raise _unavailable(domain, error) from None

    def read() -> Iterator[Document]:
        with gzip.open(target, "rt", encoding="utf-8", newline="\n") as file:
            for line in file:
                yield Document(**json.loads(line))

    return Domain(domain, Documents(read), source, file_digest(target))


def _decoded(data: bytes) -> str:
    """The text of `data`: UTF-8, or Latin-1 for some older manuals."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


# --- files and the hub -----------------------------------------------------------------------------------------------


def _local(name: str, path: Path, column: str | None) -> Domain:
    if not path.is_dir():
        return _files(name, {"": path}, column, path.name)
    files: dict[str, Path] = {}
    seen: set[str] = set()  # links may lead to a folder twice, or in a circle
    for folder, folders, names in os.walk(path, followlinks=True):
        if os.path.realpath(folder) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        folders[:] = sorted(each for each in folders if not each.startswith("."))  # caches, version control
        for file in (Path(folder, each) for each in names):
            if not file.name.startswith(".") and file.name != "README.md" and text_files.is_text_file(file):
                files[str(file.relative_to(path))] = file
    files = dict(sorted(files.items()))
    if not files:
        raise ValueError(f"{path}: the folder holds no text, JSON-lines or parquet file")
    return _files(name, files, column, f"folder {path.name}")


def _files(name: str, files: dict[str, Path], column: str | None, described: str) -> Domain:
    """A domain of files, each with the name that its documents have in reports."""
    digest = hashlib.sha256(repr(column).encode())
    for label, file in files.items():
        try:
            digest.update(f"\0{label}\0{file_digest(file)}".encode(errors="surrogateescape"))
        except OSError as error:
            raise ValueError(f"{file}: {error.strerror}") from None
    fingerprint = digest.hexdigest()

    def read() -> Iterator[Document]:
        for label, file in files.items():
            for document in text_files.read(file, column):
                row = "" if document.name == file.name else document.name
                yield Document(" ".join(filter(None, (label, row))) or file.name, document.text)

    shown = file_digest(files[""]) if "" in files else fingerprint
    return Domain(name, Documents(read), f"{described}, SHA-256 {shown[:12]}", fingerprint)


def _hub(name: str, where: str) -> Domain:
    repo, config, split, column = (*where.split(":"), "", "", "")[:4]
    try:
        if not fetch.hub_answers(repo, "dataset"):
            raise ValueError(f"{repo}: the hub is out of reach; name a local file (NAME=PATH)")
    except fetch.UnavailableError as error:
        raise ValueError(f"{error}") from None
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        rows: Any = datasets.load_dataset(repo, config or None, split=split or "train")
    except (RuntimeError, ValueError, OSError, DatasetsError) as error:  # such as a loading script
        raise ValueError(f"{where}: cannot be loaded ({(str(error).splitlines() or [''])[0]})") from None
    names = (column,) if column else text_files.COLUMNS
    chosen = next((each for each in names if each in rows.column_names), None)
    if chosen is None:
        raise ValueError(f"{where} has no column named {' or '.join(names)}: {', '.join(rows.column_names)}")

    def read() -> Iterator[Document]:
        for number, row in enumerate(rows.select_columns([chosen])):
            text = row[chosen]
            yield Document(f"row {number}", text_files.whole(text) if isinstance(text, str) else "")

    return Domain(name, Documents(read), f"hub: {where}", f"{rows._fingerprint} {chosen}")
