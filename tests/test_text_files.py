"""Users' text files: rows of any kind, odd names, odd encodings, and the row that an error names."""

import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from checkpoints import TEXT, tokenizer
from transformers import PreTrainedTokenizerFast

from recyc_jax.commands import corpus, documents, text_files


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


def texts(spec):
    return [document.text for document in documents.load(spec).documents]


@pytest.mark.parametrize(
    "rows",
    [
        [{"text": "a", "id": 7}, {"text": "b", "id": "seven"}],
        [{"text": "a", "meta": None}, {"text": "b", "meta": {"deep": [1, {"x": None}]}}],
        [{"text": "a"}, {"text": "b", "url": "there"}],
        [{"id": 1, "text": "a"}, {"content": "b"}],
        [{"text": None}, {"text": ""}, {"text": "a"}, {"text": "b"}, {}],
        [{"text": "a", "number": 10**4000, "nan": float("nan")}, {"text": "b", "text2": "\ud800"}],
    ],
    ids=range(6),
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.ndjson", "rows.json"])
def test_other_fields_do_not_matter(tmp_path, rows, name):
    assert texts(f"mine={write(tmp_path / name, rows)}") == ["a", "b"]


def test_a_number_of_many_digits_does_not_matter(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "number": ' + "9" * 10_000 + "}\n")
    assert texts(f"mine={tmp_path}/a.jsonl") == ["a"]


def test_an_unpaired_surrogate_becomes_a_replacement_character(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"text": "x\ud83dy"}, {"text": "\U0001f600"}])
    assert texts(f"mine={file}") == ["x\ufffdy", "\U0001f600"]


@pytest.mark.parametrize(
    "content", ['[{"text": "a"}, {"text": "b"}]', '{\n"text": "a"\n}', '\n{"text": "a"}\n\n{"text": "b"}']
)
def test_json_of_other_shapes(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    assert texts(f"mine={tmp_path}/a.json") == ["a", "b"][: content.count("text")]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-8"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.md"])
def test_a_byte_order_mark_is_no_text(tmp_path, encoding, name):
    content = '{"text": "größer"}\n' if name == "a.jsonl" else "größer"
    (tmp_path / name).write_bytes(content.encode(encoding))
    assert texts(f"mine={tmp_path / name}") == ["größer"]


NAMES = ["run [v1]/a.jsonl", "b/x[1].jsonl", "c/what?.jsonl", "d/a*.jsonl", "50% größer/a b.jsonl", "e::f.jsonl",
         "with,comma.jsonl", "a=b.jsonl", "h [x]/p.parquet", "a:text.jsonl", "-x.jsonl", "#1.jsonl"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_path_is_taken_as_it_is(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": ["wanted"]}), path)
    else:
        write(path, [{"text": "wanted"}])
    for other in ("b/x1.jsonl", "c/what1.jsonl", "d/ab.jsonl"):
        write(tmp_path / other, [{"text": "another"}])
    (spec,) = documents.split("--data", f"mine={path}")
    assert texts(spec) == ["wanted"]


def test_several_domains_in_a_flag():
    assert documents.split("--data", "a=/x/y,z.txt,novels, b=c/d ,a=/x/y,z.txt") == ["a=/x/y,z.txt", "novels", "b=c/d"]
    with pytest.raises(ValueError, match="--data is empty"):
        documents.split("--data", " , ")


def test_globs_are_asked_for(tmp_path):
    for number in range(3):
        write(tmp_path / f"part-{number}.jsonl", [{"text": f"text {number}"}])
    assert texts(f"mine=glob:{tmp_path}/part-*.jsonl") == ["text 0", "text 1", "text 2"]
    with pytest.raises(ValueError, match="no file matches"):
        documents.load(f"mine=glob:{tmp_path}/none-*")


def test_a_folder_of_files_of_any_kind(tmp_path):
    write(tmp_path / "deep/b.jsonl.gz", [{"text": "one"}, {"text": "two"}])
    pyarrow.parquet.write_table(pyarrow.table({"text": ["three", None]}), tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_text("four")
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"five"))
    (tmp_path / "picture.png").write_bytes(b"\x89")
    found = documents.load(f"mine={tmp_path}")
    assert {document.name: document.text for document in found.documents} == {
        "c.parquet row 0": "three",
        "d.txt": "four",
        "d.txt.gz": "five",
        "deep/b.jsonl.gz row 0": "one",
        "deep/b.jsonl.gz row 1": "two",
    }
    assert found.documents.empty == 1


def test_what_is_no_data_in_a_folder_is_passed_over(tmp_path):
    for name in ("README.md", ".hidden.txt", "._a.jsonl", ".cache/x.json", ".ipynb_checkpoints/a.txt", "data/a.txt"):
        (tmp_path / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "f" / name).write_text(name)
    (tmp_path / "real").mkdir()
    (tmp_path / "real/b.txt").write_text("linked")
    (tmp_path / "f/link").symlink_to(tmp_path / "real")
    (tmp_path / "f/circle").symlink_to(tmp_path / "f")
    assert texts(f"mine={tmp_path}/f") == ["data/a.txt", "linked"]
    assert documents.load(f"mine={tmp_path}/f").name == "mine"


def test_the_first_text_that_a_row_has_counts(tmp_path):
    rows = [{"text": None, "content": "x"}, {"text": "", "content": "y"}, {"text": "b", "content": "z"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for file in (write(tmp_path / "a.jsonl", rows), tmp_path / "a.parquet"):
        assert texts(f"mine={file}") == ["x", "y", "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\0b", "null characters"),
        ("no mark".encode("utf-16-le"), "null characters"),
        ("caf\u00e9".encode("latin-1"), "cannot be read as UTF-8"),
    ],
)
def test_other_encodings_are_named(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.txt: .*{message}"):
        texts(f"mine={tmp_path}/a.txt")


@pytest.mark.parametrize(
    "content",
    [
        b'{"text": "a"}\n{"text": "caf\xe9"}',
        gzip.compress(b"x", mtime=0),
        b'{"text": "a"}{"text": "b"}',
        b'{"text": "a"}\r{"text": 3}',
    ],
    ids=range(4),
)
def test_a_last_line_that_is_not_torn_is_named(tmp_path, content):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.jsonl:\d: not JSON"):
        texts(f"mine={tmp_path}/a.jsonl")


@pytest.mark.parametrize("torn", [b"{", b'{"te', b'{"text": "b', b'{"text": "\xc3', b'{"text": "b",', b'{"text": "b"'])
def test_what_a_killed_writer_leaves_is_torn(tmp_path, torn, capsys):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + torn)
    assert texts(f"mine={tmp_path}/a.jsonl") == ["a"]
    assert "is torn" in capsys.readouterr().err


def test_a_column_by_name(tmp_path):
    write(tmp_path / "a.jsonl", [{"text": "no", "body": "yes"}])
    pyarrow.parquet.write_table(pyarrow.table({"text": ["no"], "body": ["yes"]}), tmp_path / "b.parquet")
    for name in ("a.jsonl", "b.parquet"):
        assert texts(f"mine={tmp_path / name}:body") == ["yes"]
        with pytest.raises(ValueError, match=rf"--domains: .*{name}.* there is no column 'title'; it has text, body"):
            texts(f"mine={tmp_path / name}:title")
    (tmp_path / "plain.txt").write_text("x")
    with pytest.raises(ValueError, match="plain text: it has no column 'body'"):
        texts(f"mine={tmp_path / 'plain.txt'}:body")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', r"a\.jsonl:2: text must be a string, not a number"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', r"a\.jsonl:2: a row must be a JSON object, not a list"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n{"text": "b"}\n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n' + b"[" * 100_000 + b"\n", r"a\.jsonl:2: "),
        ("a.json", b'[{"text": "a"}', r"a\.json: cannot be read as JSON"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "a"}\n' * 9999, mtime=0)[:-30],
            r"a\.jsonl\.gz: not a complete gzip file",
        ),
        ("a.jsonl.gz", b"plain", r"a\.jsonl\.gz: not a complete gzip file"),
        ("a.parquet", b"PAR1", r"a\.parquet: cannot be read as parquet"),
    ],
)
def test_bad_rows_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        list(documents.load(f"mine={tmp_path / name}").documents)
    assert "\n" not in str(error.value)


def test_a_torn_last_line_is_passed_over_with_a_word(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b')
    assert texts(f"mine={tmp_path}/a.jsonl") == ["a"]
    assert "a.jsonl:2: the last line is torn and is passed over" in capsys.readouterr().err


def test_a_column_that_holds_no_strings_is_named(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: the column text must hold strings, not int64"):
        texts(f"mine={tmp_path}/a.parquet")


@pytest.mark.parametrize("spec", ["=x", "mine=", "mine=" + "x" * 5000, "mine=a\0b", "poems"])
def test_what_names_nothing_is_said(spec):
    with pytest.raises(ValueError, match="--domains: "):
        documents.load(spec)


# --- token files -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ids():
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer(), eos_token="<eos>")


def test_tokens_are_kept_and_found_again(tmp_path, ids, monkeypatch):
    rows = [{"text": TEXT[part:]} for part in range(5)]
    spec = f"mine={write(tmp_path / 'a.jsonl', [*rows, {'text': ' '}])}"
    made = corpus.tokenize([documents.load(spec)], ids, tmp_path / "cache")
    assert made.domains == (corpus.DomainTokens("mine", 5, 1),)
    assert made.names() == [f"row {number}" for number in range(5)]
    for number, row in enumerate(rows):
        assert made.document(number).tolist() == ids(row["text"])["input_ids"]
    assert made.domain_of(4) == "mine"
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "encode", lambda *args: pytest.fail("tokenized again"))
        again = corpus.tokenize([documents.load(spec)], ids, tmp_path / "cache")
    assert again.fingerprint == made.fingerprint
    moved = write(tmp_path / "elsewhere/b.jsonl.gz", rows)  # the same texts, stored otherwise
    assert corpus.tokenize([documents.load(f"mine={moved}")], ids, tmp_path / "cache").fingerprint == made.fingerprint
    other = corpus.tokenize([documents.load(f"yours={moved}")], ids, tmp_path / "cache")
    assert other.fingerprint != made.fingerprint
    write(tmp_path / "a.jsonl", rows[1:])
    assert corpus.tokenize([documents.load(spec)], ids, tmp_path / "cache").fingerprint != made.fingerprint


def test_another_eos_makes_other_tokens(tmp_path, ids):
    spec = f"mine={write(tmp_path / 'a.jsonl', [{'text': TEXT}])}"
    made = corpus.tokenize([documents.load(spec)], ids, tmp_path / "cache")
    without = PreTrainedTokenizerFast(tokenizer_object=tokenizer())
    other = corpus.tokenize([documents.load(spec)], without, tmp_path / "cache")
    assert (made.eos, other.eos) == (0, None)
    assert made.fingerprint != other.fingerprint


def test_what_killed_processes_left_is_removed(tmp_path, ids):
    (tmp_path / "cache/.tokens-abc.xyz").mkdir(parents=True)
    spec = f"mine={write(tmp_path / 'a.jsonl', [{'text': TEXT}])}"
    corpus.tokenize([documents.load(spec)], ids, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob(".tokens-*"))


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"domains": 3}'])
def test_a_damaged_card_is_named(tmp_path, ids, content):
    spec = f"mine={write(tmp_path / 'a.jsonl', [{'text': TEXT}])}"
    corpus.tokenize([documents.load(spec)], ids, tmp_path / "cache")
    (card,) = (tmp_path / "cache").glob("*.json")
    card.write_text(content)
    with pytest.raises(ValueError, match=r"tokens-\w+\.json: cannot be read .*delete it"):
        corpus.tokenize([documents.load(spec)], ids, tmp_path / "cache")


def test_texts_that_cannot_be_read_leave_no_tokens(tmp_path, ids):
    spec = f"mine={write(tmp_path / 'a.jsonl', [{'text': 'a'}, {'text': 3}])}"
    with pytest.raises(ValueError, match=r"a\.jsonl:2"):
        corpus.tokenize([documents.load(spec)], ids, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_damaged_token_files_are_named(tmp_path, ids):
    spec = f"mine={write(tmp_path / 'a.jsonl', [{'text': TEXT}])}"
    corpus.tokenize([documents.load(spec)], ids, tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("*.bin")
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"tokens-\w+\.bin: cut short; delete tokens-\w+\.json"):
        corpus.tokenize([documents.load(spec)], ids, tmp_path / "cache")


def test_a_corpus_without_tokens(tmp_path, ids):
    empty = documents.Domain("mine", documents.Documents(lambda: iter([text_files.Document("a", " ")])), "", "print")
    made = corpus.tokenize([empty], ids, tmp_path)
    assert (made.tokens.size, made.largest, made.domains[0].empty) == (0, 0, 1)
    assert len(corpus.Windows(made, np.arange(0), 8)) == 0
