"""Sources of texts: local files, the hub's layout, packages; and the errors if there is none."""

import json
import struct
import zlib

import datasets
import pytest

from eval.ruler import material
from eval.ruler.tasks import qa
from recyc_jax.commands import novels


def r_record(strings):
    body = b"X\n" + struct.pack(">iiii", 3, 0x00040201, 0x00030500, 5) + b"UTF-8" + struct.pack(">ii", 16, len(strings))
    for string in strings:
        raw = string.encode()
        body += struct.pack(">ii", 0x00040009, len(raw)) + raw
    packed = zlib.compress(body)
    return struct.pack(">i", len(body)) + packed


def test_novels(tmp_path):
    file = tmp_path / "Rdata.rdb"
    file.write_bytes(r_record(["EMMA", "", "“Quoted”"]) + r_record(["Second novel"]))
    assert list(novels.texts(file)) == ["EMMA\n\n“Quoted”", "Second novel"]
    file.write_bytes(b"\0\0\0\0nonsense")
    with pytest.raises(ValueError, match=r"Rdata\.rdb: not an R database"):
        list(novels.texts(file))


def test_essays_from_files(tmp_path):
    plain, official = tmp_path / "essays.txt", tmp_path / "PaulGrahamEssays.json"
    plain.write_text("One two. Three\nfour.")
    official.write_text(json.dumps({"text": "Five six."}))
    essays, source = material.essays(str(plain))
    assert essays.words == ("One", "two.", "Three", "four.")
    assert source.startswith("essays.txt, SHA-256 ")
    assert essays.sentences("Mr. Knightley spoke. Emma did not.") == ["Mr. Knightley spoke.", "Emma did not."]
    assert material.essays(str(official))[0].words == ("Five", "six.")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("[]", "neither UTF-8 text nor JSON"),
        ('{"text": " "}', "no text"),
        ('{"text": 3}', "neither UTF-8 text nor JSON"),
    ],
)
def test_bad_essays_are_named(tmp_path, content, message):
    file = tmp_path / "essays.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=rf"--essays .*essays\.json.*{message}"):
        material.essays(str(file))


def test_without_any_essays_a_line_says_how_to_provide_them(monkeypatch, tmp_path):
    monkeypatch.setenv("RECYC_JAX_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))  # no apt-get
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"no essays .* needs apt-get, .*; pass --essays PATH"):
        material.essays(None)


def test_the_hubs_squad_is_the_official_one():
    rows = datasets.Dataset.from_list(
        [
            dict(title="A", context="c1", question="q1", answers=dict(text=["x", "y"], answer_start=[0, 1])),
            dict(title="A", context="c1", question="q2", answers=dict(text=[], answer_start=[])),
            dict(title="A", context="c2", question="q3", answers=dict(text=["z"], answer_start=[0])),
            dict(title="B", context="c3", question="q4", answers=dict(text=["w"], answer_start=[0])),
        ]
    )
    questions = qa.read_squad(material.squad_file(rows))
    assert questions.documents == ("c1", "c2", "c3")
    assert [question.text for question in questions.questions] == ["q1", "q3", "q4"]
    assert questions.questions[0] == qa.Question("q1", ("x", "y"), (0,), (1,))


def test_the_hubs_hotpot_is_the_official_one():
    context = dict(title=["T1", "T2"], sentences=[["a.", " b."], ["c."]])
    rows = datasets.Dataset.from_list([dict(question="q", answer="yes", context=context)])
    questions = qa.read_hotpot(material.hotpot_file(rows))
    assert questions.documents == ("T1\na. b.", "T2\nc.")
    assert questions.questions == (qa.Question("q", ("yes",), (0, 1), ()),)


@pytest.mark.parametrize("content", ["{", "[]", '{"data": [{}]}', '{"data": []}'])
def test_bad_question_files_are_named(tmp_path, content):
    file = tmp_path / "dev.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"--qa-squad .*dev\.json: "):
        material.squad(str(file))
