"""`python -m eval.language_modeling` on a tiny random checkpoint in a folder."""

import contextlib
import io
import json
import math
import shutil
import signal

import checkpoints
import numpy as np
import pytest
from conftest import called, send_when

import recyc_jax as rj
from eval.language_modeling import report
from eval.language_modeling.windows import windows
from recyc_jax.commands import documents
from recyc_jax.loading.tokenizer import load_tokenizer

POLICIES = ("full", "recycled:budget=0.125,check_every=4,threshold=0.3", "streaming_llm:budget=400", "h2o:budget=0.2")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    checkpoints.write_folder(folder)
    (folder / "prose.txt").write_text(checkpoints.TEXT * 30)
    with (folder / "rows.jsonl").open("w") as file:
        for part in range(3):
            file.write(json.dumps({"text": (checkpoints.TEXT[part * 7 :] + "\n") * 8}) + "\n")
    return folder


def command(folder, out, *more, **options):
    default = dict(model=folder, domains=f"prose={folder}/prose.txt,rows={folder}/rows.jsonl", lengths="200")
    default |= {"new-tokens": 16, "sequences": 4, "batch-size": 3, "out": out}
    flags = [part for name, value in (default | options).items() for part in (f"--{name}", value)]
    return ["eval.language_modeling", *map(str, flags), "--policies", *POLICIES, *more]


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """One complete run, which several tests inspect: its folder, and what it printed."""
    out = tmp_path_factory.mktemp("finished") / "out"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert called(*command(model, out, lengths="200,120")) == 0
    return out, printed.getvalue()


def rows(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_a_whole_run(finished):
    out, printed = finished
    found = rows(out)
    assert len(found) == 2 * 2 * 4 * 4  # domains, lengths, sequences, policies
    summary = json.loads((out / "summary.json").read_text())
    assert len(summary) == 2 * 2 * 4
    for row in summary:
        assert row["n"] == 4
        assert row["perplexity"] == pytest.approx(math.exp(row["nll"]), rel=1e-3)
        if row["policy"] == "full":
            assert (row["difference"], row["effective_stride"]) == (0, 1)
        if row["policy"] == "streaming_llm:budget=400":  # a budget above the number of tokens
            assert row["difference"] == pytest.approx(0, abs=1e-4)
            assert row["effective_stride"] is None
        if row["policy"] == POLICIES[1]:
            assert row["effective_stride"] >= 4
            assert row["difference"] != 0
    report = (out / "report.md").read_text()
    assert "## 200 tokens" in report
    assert "| policy | prose | difference | rows | difference | effective stride |" in report
    assert "- dtype: float32" in report
    assert "`h2o:budget=0.2` at 200: 40 entries" in report
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "perplexity at 120 tokens" in printed


def test_windows_begin_with_bos_where_the_tokenizer_adds_it(model, tmp_path):
    shutil.copytree(model, tmp_path / "m")
    file = tmp_path / "m/tokenizer.json"
    bos = {"SpecialToken": {"id": "<eos>", "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {"<eos>": {"id": "<eos>", "ids": [0], "tokens": ["<eos>"]}},
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": template}))
    tokenizer = load_tokenizer(tmp_path / "m")
    domains = [documents.load(f"prose={model}/prose.txt")]
    text = tokenizer((model / "prose.txt").read_text(), add_special_tokens=False)["input_ids"]
    found, _ = windows(domains, [100], tokenizer, count=9, skip=0, seed=1)
    assert len(found) == 9
    for window in found:
        assert list(window.tokens) == [0, *text[window.offset : window.offset + 99]]


def test_rows_are_what_score_says(finished, model):
    """The nll of a row can be reproduced from its document, offset and policy with `score`."""
    lm = rj.load_pretrained(str(model))
    text = (model / "prose.txt").read_text()
    ids = lm.tokenizer(text)["input_ids"]
    some = [row for row in rows(finished[0]) if (row["domain"], row["length"]) == ("prose", 120)]
    assert len({row["offset"] for row in some}) == 4
    for row in some[::3]:
        assert row["offset"] % 120 == 0
        tokens = np.asarray([ids[row["offset"] : row["offset"] + 120]])
        policy = rj.parse_policy(row["policy"], 120)
        scores = rj.score(lm.params, lm.config, tokens, policy=policy, context_length=104)
        assert row["nll"] == pytest.approx(-float(np.mean(scores)), abs=1e-4)


def test_a_finished_run_is_not_repeated(finished, model, call_module, tmp_path, monkeypatch):
    shutil.copytree(finished[0], tmp_path / "out")
    monkeypatch.setattr("recyc_jax.loading.weights.load_params", None)  # not even weights are read
    done = call_module(*command(model, tmp_path / "out", lengths="200,120"))
    assert done.returncode == 0
    assert rows(tmp_path / "out") == rows(finished[0])
    # a part of it is reported without being measured again, and what is there stays
    part = call_module(*command(model, tmp_path / "out", lengths="200", sequences=2))
    assert part.returncode == 0
    assert rows(tmp_path / "out") == rows(finished[0])
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert {(row["length"], row["n"]) for row in summary} == {(200, 2)}


def test_a_run_grows(finished, model, call_module, tmp_path):
    """Further lengths, sequences and policies are added, and are what a run with all of them from the start gives."""
    out = tmp_path / "out"
    usual = ["full", "streaming_llm:budget=400"]

    def grown(out, policies, **options):
        return call_module(*command(model, out, **options)[: -len(POLICIES)], *policies)

    assert grown(out, usual[:1], sequences=2).returncode == 0
    first = rows(out)
    assert grown(out, usual, sequences=4, lengths="200,120").returncode == 0
    assert rows(out)[: len(first)] == first

    def results(out):
        return {
            (row["policy"], row["domain"], row["length"], row["index"]): (row["sample"], round(row["nll"], 4))
            for row in rows(out)
            if row["policy"] in usual
        }

    assert results(out) == results(finished[0])


@pytest.mark.parametrize(
    ("option", "value", "name"), [("seed", 7, "seed"), ("new-tokens", 8, "new_tokens"), ("dtype", "bfloat16", "dtype")]
)
def test_what_would_change_rows_is_refused_by_name(finished, model, call_module, tmp_path, option, value, name):
    shutil.copytree(finished[0], tmp_path / "out")
    refused = call_module(*command(model, tmp_path / "out", **{option: value}))
    assert refused.returncode == 2
    assert f"holds another configuration: {name} was " in refused.stderr
    assert refused.stderr.rstrip().endswith("choose another --out, or begin anew with --fresh")
    assert rows(tmp_path / "out") == rows(finished[0])


def test_changed_texts_are_refused_and_fresh_begins_anew(finished, model, call_module, tmp_path):
    shutil.copytree(finished[0], tmp_path / "out")
    (tmp_path / "prose.txt").write_text(checkpoints.TEXT[5:] * 30)
    changed = dict(domains=f"prose={tmp_path}/prose.txt", sequences=1)
    refused = call_module(*command(model, tmp_path / "out", **changed))
    assert refused.returncode == 2
    assert "holds results of other samples: those of domain prose, length 200, index 0 have changed" in refused.stderr
    assert call_module(*command(model, tmp_path / "out", "--fresh", **changed)).returncode == 0
    assert len(rows(tmp_path / "out")) == len(POLICIES)
    assert (tmp_path / "out/results-1.jsonl").read_text() == (finished[0] / "results.jsonl").read_text()


def test_a_model_is_its_weights(finished, model, call_module, tmp_path):
    """Another folder with the same weights goes on; other weights in the same folder are refused."""
    out, copy = tmp_path / "out", tmp_path / "another name"
    shutil.copytree(finished[0], out)
    shutil.copytree(model, copy)
    done = call_module(*command(model, out, model=f"{copy}/", lengths="200,120"))
    assert done.returncode == 0
    assert rows(out) == rows(finished[0])
    checkpoints.write_folder(copy, rope_theta=5000.0)
    refused = call_module(*command(model, out, model=copy))
    assert refused.returncode == 2
    assert "holds another configuration: weights was " in refused.stderr


def test_a_killed_run_goes_on(finished, model, start_module, call_module, tmp_path):
    out = tmp_path / "out"
    process = start_module(*command(model, out, lengths="200,120"))
    send_when(process, lambda: (out / "results.jsonl").exists() and rows(out), signal.SIGKILL)
    before = rows(out)
    assert 0 < len(before) < 64
    done = call_module(*command(model, out, lengths="200,120"))
    assert done.returncode == 0, done.stderr
    after = rows(out)
    assert after[: len(before)] == before

    def results(some):
        return sorted((row["policy"], row["domain"], row["length"], row["index"], round(row["nll"], 4)) for row in some)

    assert results(after) == results(rows(finished[0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"domains": "poems"}, "--domains: 'poems' is unknown; there is novels, essays, latex (or NAME=PATH)"),
        (
            {"domains": "x=nowhere.txt"},
            "--domains: x=nowhere.txt: there is no such file or folder, and it is no dataset",
        ),
        ({"domains": "a=tests,a=eval"}, "--domains names a domain twice"),
        ({"domains": "x=some/dataset"}, "the hub is out of reach"),
        ({"lengths": "100000"}, "exceeds the model's context"),
        ({"lengths": "16"}, "--new-tokens 16 leaves no context of --lengths 16"),
        ({"sequences": 0}, "--sequences 0 must be at least 1"),
        ({"skip": -1}, "--skip -1 must be 0 or more"),
        ({"skip": 1000}, "--skip 1000 leaves nothing of prose: it has "),
        ({"new-tokens": 0}, "--new-tokens 0 must be at least 1"),
        ({"backend": "tpu"}, "--backend tpu: "),
    ],
)
def test_bad_flags_end_in_one_line(model, call_module, tmp_path, options, message):
    done = call_module(*command(model, tmp_path / "out", **options))
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_text_that_is_too_short_is_named(model, call_module, tmp_path):
    (tmp_path / "short.txt").write_text("A few words.")
    done = call_module(*command(model, tmp_path / "out", domains=f"short={tmp_path}/short.txt"))
    assert done.returncode == 2
    assert "no document of short has 200 tokens" in done.stderr


def test_skipped_sequences_are_the_first_of_a_run_without_it(model):
    tokenizer = load_tokenizer(model)
    domains = [documents.load(f"prose={model}/prose.txt")]

    def chosen(count, skip=0):
        found, _ = windows(domains, [200], tokenizer, count=count, skip=skip, seed=42)
        return [(one.index, one.offset) for one in found]

    assert chosen(6) == chosen(2) + chosen(4, skip=2)


def test_summary_pairs_sequences():
    made = [
        dict(policy=policy, domain="d", length=8, index=index, nll=nll, steps=9, full_steps=full, seconds=0.1)
        for policy, index, nll, full in (("full", 0, 2.0, 9), ("full", 1, 3.0, 9), ("p", 0, 2.1, 0), ("p", 1, 3.3, 0))
    ]
    full, other = report.summarise(made, ["full", "p"])
    assert full["perplexity"] == pytest.approx(math.exp(2.5), rel=1e-4)
    assert other["difference"] == pytest.approx(0.2)
    assert other["difference_stderr"] == pytest.approx(0.1)  # the error of the differences, far below that of the means
    assert other["effective_stride"] is None
