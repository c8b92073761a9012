"""Long documents for evaluation and training: from Debian packages, local files or datasets of the hub."""

from __future__ import annotations

import gzip
import html.parser
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from recyc_jax.commands import novels
from recyc_jax.commands.files import fingerprint
from recyc_jax.loading import fetch


class Document(NamedTuple):
    name: str
    text: str


class Domain(NamedTuple):
    name: str
    documents: list[Document]
    source: str  # for reports


def load(spec: str, flag: str = "--domains") -> Domain:
    """The domain that an item of `flag` names.

    `spec` is `novels`, `essays` or `latex`, which come from Debian packages; `NAME=PATH` for a text, JSON-lines or
    parquet file or a folder of texts; or `NAME=DATASET` or `NAME=DATASET:CONFIG:SPLIT` on the hub. Raises ValueError
    that says what is unavailable or unreadable.
    """
    try:
        return _load(spec)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None


def _load(spec: str) -> Domain:
    """`load` with error messages that do not name the flag."""
    name, given, where = spec.partition("=")
    if not given:
        if spec not in PACKAGED:
            raise ValueError(f"{spec!r} is unknown; there is {', '.join(PACKAGED)} (or NAME=PATH)")
        documents, source = PACKAGED[spec]()
    elif Path(where).exists():
        documents, source = _local(Path(where))
    elif re.fullmatch(r"[\w.-]+/[\w.-]+(:[^:/]*){0,2}", where):
        documents, source = _hub(where)
    else:
        raise ValueError(f"{spec}: there is no such file or folder, and it is no dataset of the hub")
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise ValueError(f"{spec}: there is no text in it")
    return Domain(name, documents, source)


# --- packages --------------------------------------------------------------------------------------------------------


def _novels() -> tuple[list[Document], str]:
    try:
        file = novels.fetched()
    except fetch.UnavailableError as error:
        raise _unavailable("novels", error) from None
    # the database has no titles
    documents = [Document(f"novel {number}", text) for number, text in enumerate(novels.texts(file), 1)]
    return documents, "six novels of Jane Austen (Debian package r-cran-janeaustenr, public domain)"


def _essays() -> tuple[list[Document], str]:
    documents = _packaged("essays", "anarchism", "usr/share/doc/anarchism/html/*.html", html_text)
    return documents, "An Anarchist FAQ (Debian package anarchism, GPL-2 or later, GFDL)"


def _latex() -> tuple[list[Document], str]:
    documents = _packaged("latex", "texlive-lang-english", "usr/share/doc/texlive-doc/**/*.tex*", lambda text: text)
    return documents, "LaTeX manuals (Debian package texlive-lang-english, free licences of each)"


PACKAGED: dict[str, Callable[[], tuple[list[Document], str]]] = {"novels": _novels, "essays": _essays, "latex": _latex}


def _unavailable(domain: str, error: Exception) -> ValueError:
    return ValueError(f"{domain}: {error}; leave it out, or name texts of your own (NAME=PATH)")


def _packaged(domain: str, package: str, pattern: str, convert: Callable[[str], str]) -> list[Document]:
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
    with gzip.open(target, "rt", encoding="utf-8", newline="\n") as file:
        return [Document(**json.loads(line)) for line in file]


def _decoded(data: bytes) -> str:
    """The text of `data`: UTF-8, or Latin-1 for some older manuals."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


class _Text(html.parser.HTMLParser):
    """Collects the running text of a page, with blank lines between paragraphs."""

    BLOCKS = frozenset({"p", "h1", "h2", "h3", "h4", "blockquote", "li", "ul", "ol", "div", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.in_head = False

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.in_head = self.in_head or tag == "head"
        if tag in self.BLOCKS:
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        self.in_head = self.in_head and tag != "head"
        if tag in self.BLOCKS:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self.in_head:
            self.parts.append(re.sub(r"\s+", " ", data))


def html_text(page: str) -> str:
    """The text of an HTML page without tags and head; white space is collapsed as a browser does."""
    parser = _Text()
    parser.feed(page)
    parser.close()
    paragraphs = (re.sub(r" +", " ", part).strip() for part in "".join(parser.parts).split("\n\n"))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


# --- files and the hub -----------------------------------------------------------------------------------------------


def _local(path: Path) -> tuple[list[Document], str]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".md", ".tex") and file.is_file())
        return [Document(str(file.relative_to(path)), _read(file)) for file in files], f"folder {path.name}"
    source = f"{path.name}, SHA-256 {fingerprint(path)}"
    if path.suffix in (".json", ".jsonl", ".parquet"):
        import datasets
        from datasets.exceptions import DatasetGenerationError

        datasets.disable_progress_bars()  # reading takes an instant
        kind = "parquet" if path.suffix == ".parquet" else "json"
        try:
            rows = datasets.load_dataset(kind, data_files=str(path), split="train")
        except (DatasetGenerationError, ValueError, OSError) as error:
            raise ValueError(f"{path}: cannot be read as {kind} ({error})") from None
        return list(_from_rows(rows, str(path))), source
    return [Document(path.name, _read(path))], source


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as UTF-8 text ({error})") from None


def _hub(where: str) -> tuple[list[Document], str]:
    name, config, split = (*where.split(":"), "", "")[:3]
    try:
        if not fetch.hub_answers(name, "dataset"):
            raise ValueError(f"{name}: the hub is out of reach; name a local file (NAME=PATH)")
    except fetch.UnavailableError as error:
        raise ValueError(f"{error}") from None
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train")
    except (RuntimeError, ValueError, OSError, DatasetsError) as error:  # such as a loading script
        raise ValueError(f"{where}: cannot be loaded ({(str(error).splitlines() or [''])[0]})") from None
    return list(_from_rows(rows, name)), f"hub: {where}"


def _from_rows(rows: Any, where: str) -> Iterator[Document]:
    column = next((name for name in ("text", "content", "document") if name in rows.column_names), None)
    if column is None:
        raise ValueError(f"{where} has no column named text, content or document: {rows.column_names}")
    for number, row in enumerate(rows):
        if isinstance(row[column], str):
            yield Document(f"row {number}", row[column])
