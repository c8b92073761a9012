"""Texts and word lists of the tasks: from the hub, local files or packages, fetched once."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from eval.ruler.tasks.base import Essays, Words
from eval.ruler.tasks.qa import QuestionSet, read_hotpot, read_squad
from recyc_jax.commands import novels, text_files
from recyc_jax.commands.files import fingerprint
from recyc_jax.loading import fetch

HUB_ESSAYS = "baber/paul_graham_essays"
_PUNKT_WHEEL = "llama-index-core==0.14.25"
_PUNKT_SHA256 = "caa7d9c5ac9b13dc33400cf8d5e92e689b6d1e4497eb9bfa50d6f52ca2eb22a1"
_PUNKT_MEMBER = "llama_index/core/_static/nltk_cache/tokenizers/punkt_tab/english"


def words() -> Words:
    """The word lists of the `wonderwords` package, each sorted and without duplicates."""
    assets = resources.files("wonderwords") / "assets"

    def read(name: str) -> tuple[str, ...]:
        lines = (assets / f"{name}list.txt").read_text(encoding="utf-8").splitlines()
        return tuple(sorted({line.rstrip() for line in lines} - {""}))

    return Words(read("noun"), read("adjective"), read("verb"))


def essays(path: str | None) -> tuple[Essays, str]:
    """Prose for essay haystacks, and a line that names its source.

    It is taken from `path` (text, or RULER's PaulGrahamEssays.json) if given, else from another project's copy of the
    official essays on the hub (RULER itself downloads them from their author's site), else from six novels of Jane Austen
    in a Debian package. Raises ValueError if none of these is available.
    """
    if path is not None:
        text, source = _read_essays(Path(path)), f"{Path(path).name}, SHA-256 {fingerprint(Path(path))}"
    elif revision := _hub_revision(HUB_ESSAYS):
        rows = _hub_rows(HUB_ESSAYS, None, "train", revision)
        text = "\n".join(row["text"] for row in rows)
        source = f"hub: {HUB_ESSAYS}, another project's copy of the official essays, revision {revision}"
    else:
        try:
            file = novels.fetched()
        except fetch.UnavailableError as error:
            raise ValueError(
                f"no essays for the haystack: the hub is out of reach and {error}; pass --essays PATH (a long English "
                "text, or RULER's PaulGrahamEssays.json)"
            ) from None
        text = "\n".join(novels.texts(file))
        source = f"six novels of Jane Austen (Debian package {novels.PACKAGE}) in place of the official essays"
    tokens = tuple(text.split())
    if not tokens:
        raise ValueError(f"--essays {path}: there is no text in it")
    return Essays(tokens, _sentence_splitter()), source


def _read_essays(path: Path) -> str:
    try:
        data = path.read_bytes()
        text = text_files.decoded(data, "")
        text = json.loads(text)["text"] if path.suffix == ".json" else text
        if not isinstance(text, str):
            raise TypeError
        return text_files.whole(text)
    except OSError as error:
        raise ValueError(f"--essays {path}: {error.strerror}") from None
    except (ValueError, RecursionError, KeyError, TypeError):
        raise ValueError(f'--essays {path}: neither UTF-8 text nor JSON of the form {{"text": ...}}') from None


def _sentence_splitter() -> Any:
    """NLTK's Punkt sentence splitter for English; fetches its model once if NLTK has none installed."""
    import nltk
    from nltk.tokenize.punkt import PunktTokenizer

    try:
        return PunktTokenizer("english").tokenize
    except LookupError:
        target = fetch.cache_dir() / "nltk_data/tokenizers/punkt_tab/english"
        try:
            fetch.wheel_member(_PUNKT_WHEEL, _PUNKT_SHA256, _PUNKT_MEMBER, target)
        except fetch.UnavailableError as error:
            raise ValueError(
                f"essay haystacks need NLTK's punkt_tab ({error}): python -m nltk.downloader punkt_tab"
            ) from None
        nltk.data.path.append(str(fetch.cache_dir() / "nltk_data"))
        return PunktTokenizer("english").tokenize


def squad(path: str | None) -> QuestionSet | None:
    """SQuAD 2.0's development set from its official file `path`, or from the hub if None; None if the hub is out of
    reach."""
    if path is not None:
        return _parse("--qa-squad", path, read_squad)
    revision = _hub_revision("rajpurkar/squad_v2")
    if revision is None:
        return None
    return read_squad(squad_file(_hub_rows("rajpurkar/squad_v2", None, "validation", revision)))


def hotpot(path: str | None) -> QuestionSet | None:
    """HotpotQA's distractor development set from its official file `path`, or from the hub if None; None if the hub is
    out of reach."""
    if path is not None:
        return _parse("--qa-hotpot", path, read_hotpot)
    revision = _hub_revision("hotpotqa/hotpot_qa")
    if revision is None:
        return None
    return read_hotpot(hotpot_file(_hub_rows("hotpotqa/hotpot_qa", "distractor", "validation", revision)))


def _parse(flag: str, path: str, read: Any) -> QuestionSet:
    try:
        questions = read(json.loads(text_files.decoded(Path(path).read_bytes(), "as text")))
    except OSError as error:
        raise ValueError(f"{flag} {path}: {error.strerror}") from None
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{flag} {path}: not in the official layout ({type(error).__name__}: {error})") from None
    if not questions.questions:
        raise ValueError(f"{flag} {path}: there is no question in it")
    return questions


def _hub_revision(dataset: str) -> str | None:
    """The revision of a dataset on the hub; None if the hub is out of reach or has no such dataset."""
    try:
        return fetch.hub_revision(dataset, "dataset")
    except fetch.UnavailableError:
        return None


def _hub_rows(name: str, config: str | None, split: str, revision: str) -> Any:
    import datasets

    return datasets.load_dataset(name, config, split=split, revision=revision)


def squad_file(rows: Any) -> dict[str, Any]:
    """The hub's SQuAD rows in the layout of the official file, articles and paragraphs in order of appearance."""
    articles: dict[str, dict[str, list[Any]]] = {}
    for row in rows:
        answers = [{"text": text} for text in row["answers"]["text"]]
        qa = {"question": row["question"], "is_impossible": not answers, "answers": answers}
        articles.setdefault(row["title"], {}).setdefault(row["context"], []).append(qa)
    return {
        "data": [
            {"paragraphs": [{"context": context, "qas": qas} for context, qas in paragraphs.items()]}
            for paragraphs in articles.values()
        ]
    }


def hotpot_file(rows: Any) -> list[dict[str, Any]]:
    """The hub's HotpotQA rows in the layout of the official file."""
    return [
        {
            "question": row["question"],
            "answer": row["answer"],
            "context": list(zip(row["context"]["title"], row["context"]["sentences"], strict=True)),
        }
        for row in rows
    ]
