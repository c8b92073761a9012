"""`python -m eval.ruler` on a tiny random checkpoint in a folder; in processes of its own where signals end it."""

import contextlib
import io
import json
import shutil
import signal
import time

import checkpoints
import pytest
from conftest import called, send_when

from eval.ruler.cells import prompt_ids
from recyc_jax.loading.tokenizer import load_tokenizer

TASKS = "niah_single_1,niah_multiquery,niah_multivalue"
POLICIES = ("full", "recycled:budget=0.125,stride=5", "recycled:budget=4000,stride=50")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    checkpoints.write_folder(folder)
    (folder / "essays.txt").write_text(checkpoints.TEXT * 200)
    return folder


@pytest.fixture
def ruler(call_module, model, tmp_path):
    def run(*more, **options):
        default = dict(model=model, tasks=TASKS, lengths="720", samples=3, batch_size=2, out=tmp_path / "out")
        default["essays"] = model / "essays.txt"
        flags = [
            part for name, value in (default | options).items() if value is not None for part in (f"--{name}", value)
        ]
        return call_module("eval.ruler", *flags, *more)

    return run


def whole_run(model, out):
    flags = ["--model", model, "--tasks", TASKS, "--lengths", "720", "--samples", 3, "--batch-size", 2]
    return ["eval.ruler", *flags, "--out", out, "--essays", model / "essays.txt", "--policies", *POLICIES]


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """One whole run that several tests look at: its folder, and what it printed."""
    out = tmp_path_factory.mktemp("finished") / "deep" / "out"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert called(*whole_run(model, out)) == 0
    return out, printed.getvalue()


def rows(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_a_whole_run(finished):
    out, printed = finished
    found = rows(out)
    assert len(found) == 3 * 3 * 3  # tasks, samples, policies
    assert set(found[0]) >= {"policy", "task", "length", "index", "prompt_tokens", "prediction", "references", "score"}
    assert {row["index"] for row in found} == {0, 1, 2}
    for row in found:
        assert row["prompt_tokens"] < row["length"]
        assert "One of the special magic" not in row["prediction"] or row["score"] < 1
    summary = json.loads((out / "summary.json").read_text())
    assert len(summary) == 3 * 3
    measured = {
        "score",
        "n",
        "stderr",
        "difference",
        "difference_stderr",
        "effective_stride",
        "steps",
        "nulls",
        "seconds",
    }
    assert set(summary[0]) == {"policy", "task", "length", *measured}
    assert all(row["n"] == 3 for row in summary)
    for row in summary:
        if row["policy"] == "full":
            assert (row["difference"], row["difference_stderr"]) == (0, 0)
        if row["policy"] == "recycled:budget=0.125,stride=5":
            steps = sum(r["steps"] for r in found if r["policy"] == row["policy"] and r["task"] == row["task"])
            assert steps > 5
            assert row["effective_stride"] >= 5
    report = (out / "report.md").read_text()
    assert "| task | A | B | C |" in report
    letters = ["- A: `full`", "- B: `recycled:budget=0.125,stride=5`", "- C: `recycled:budget=4000,stride=50`"]
    assert "\n".join(letters) in report
    assert "`recycled:budget=0.125,stride=5` at 720: 90 entries a partial step, 0.125 of the length" in report
    assert "- dtype: float32" in report
    assert "3 tasks of 13, 3 samples each" in report
    assert "| `recycled:budget=4000,stride=50` | 0.0 | 0.0 to 0.0 | " in report
    assert all(f"| {name} | " in report for name in (*TASKS.split(","), "mean"))
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "RULER at 720 tokens" in printed
    assert {path.name for path in out.glob(".*")} == {".lock"}


def test_a_budget_above_the_length_predicts_what_full_attention_predicts(finished):
    predictions = {}
    for row in rows(finished[0]):
        predictions.setdefault(row["policy"], {})[row["task"], row["length"], row["index"]] = row["prediction"]
    assert predictions["full"] == predictions["recycled:budget=4000,stride=50"]
    assert predictions["full"] != predictions["recycled:budget=0.125,stride=5"]


def test_dumped_samples_give_the_same_results(ruler, finished, tmp_path):
    dumped = ruler(lengths="720,760", **{"dump-samples": tmp_path / "samples"})
    assert dumped.returncode == 0, dumped.stderr
    file = tmp_path / "samples/720/data/niah_multiquery/validation.jsonl"
    first = json.loads(file.read_text().splitlines()[0])
    expected = {"index", "input", "outputs", "length", "length_w_model_temp", "answer_prefix"}
    assert set(first) == expected | {"token_position_answer"}
    needle = json.loads((tmp_path / "samples/720/data/niah_single_1/validation.jsonl").read_text().splitlines()[0])
    assert 0 < needle["token_position_answer"] < needle["length"]
    assert first["length"] == first["length_w_model_temp"] <= 720
    again = ruler(lengths="720,760", policies="full", data=tmp_path / "samples", essays=None)
    assert again.returncode == 0, again.stderr
    found = rows(tmp_path / "out")
    assert [row["length"] for row in found] == [720] * 9 + [760] * 9
    keys = ["task", "length", "index", "prompt_tokens", "prediction", "references", "score"]
    expected = [[row[key] for key in keys] for row in rows(finished[0]) if row["policy"] == "full"]
    assert [[row[key] for key in keys] for row in found[:9]] == expected


def test_an_interrupted_run_resumes(finished, model, start_module, call_module, tmp_path):
    """Killed runs, which resume from the same kind of log, are tested with `eval.language_modeling`."""
    results = tmp_path / "out/results.jsonl"
    command = whole_run(model, tmp_path / "out")
    process = start_module(*command)
    assert send_when(process, lambda: results.exists() and results.stat().st_size, signal.SIGINT) == 130
    assert "interrupted; the same command resumes from what" in process.communicate()[1]
    before = results.read_text()
    assert 0 < before.count("\n") < 27
    with results.open("a") as file:  # a line cut short by a kill
        file.write('{"policy": "full", "task": "v')
    done = call_module(*command)
    assert done.returncode == 0, done.stderr
    assert results.read_text().startswith(before)

    def essence(row):
        return {name: value for name, value in row.items() if name != "seconds"}

    key = lambda row: (row["policy"], row["task"], row["length"], row["index"])  # noqa: E731
    got, expected = (sorted(map(essence, rows(folder)), key=key) for folder in (tmp_path / "out", finished[0]))
    assert got == expected
    assert call_module(*command).returncode == 0  # nothing is left to do
    assert len(rows(tmp_path / "out")) == 27


@pytest.mark.parametrize(
    ("options", "name"), [(dict(seed=7), "seed was 42"), (dict(dtype="bfloat16"), "dtype was 'float32'")], ids=str
)
def test_another_configuration_in_the_folder_is_refused_by_name(ruler, finished, options, name):
    out, _ = finished
    before = (out / "results.jsonl").read_bytes()
    done = ruler("--policies", *POLICIES, out=out, **options)
    assert done.returncode == 2
    assert f"holds another configuration: {name}" in done.stderr
    assert (out / "results.jsonl").read_bytes() == before


def test_bad_input_reads_no_weights(ruler, model, tmp_path, monkeypatch):
    """Errors in the input are reported before weights are read, and the results folder stays usable."""
    with monkeypatch.context() as patch:
        patch.setattr("recyc_jax.loading.weights.load_params", None)
        assert "is below the minimum" in ruler(lengths="100").stderr
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (broken / "model.safetensors").unlink()
    assert "model.safetensors" in ruler(model=broken).stderr
    done = ruler(tasks="niah_single_1", samples=1)
    assert done.returncode == 0, done.stderr


def test_the_chat_template(ruler, tmp_path):
    done = ruler(template="chat", **{"dump-samples": tmp_path / "samples"})
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "samples/720/data/niah_multiquery/validation.jsonl").read_text().splitlines()[0])
    assert row["input"].startswith("<user>Some special magic numbers")
    assert row["input"].endswith("<answer>")
    assert row["length_w_model_temp"] > row["length"]


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        (dict(policies="magic"), "'magic' is unknown"),
        (dict(policies="recycled:budget=0,stride=1"), "budget=0 must be at least 1"),
        (dict(policies="recycled:budget=9,stride=0"), "stride=0 must be at least 1"),
        (dict(tasks="vt,niah_9"), "--tasks: 'niah_9' is unknown"),
        (dict(lengths="100"), "length 100 is below the minimum of niah_single_1"),
        (dict(lengths="1k"), "--lengths: '1k' is not a positive whole number"),
        (dict(lengths="5000"), "--lengths 5000 exceeds the model's context of 4096"),
        (dict(samples=0), "--samples 0 must be at least 1"),
        (dict(backend="gpu"), "--backend gpu: no such device; JAX found 1 x cpu"),
        (dict(out="/proc/nowhere/out"), "--out /proc/nowhere/out"),
        (dict(model="no-such-model"), "model 'no-such-model' is neither"),
        (dict(essays="/nowhere.txt"), "--essays /nowhere.txt: No such file"),
        (dict(data="/nowhere", essays=None), "--data /nowhere: there is no such folder"),
        (dict(**{"qa-squad": "/nowhere.json"}, tasks="qa_1"), "--qa-squad /nowhere.json: No such file"),
    ],
    ids=str,
)
def test_bad_input_ends_with_one_line(ruler, options, culprit):
    done = ruler(**options)
    assert done.returncode == 2
    assert culprit in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert lines[-1].startswith("error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "culprit"),
    [
        ("{", "validation.jsonl:1: not a sample"),
        ("[]", "validation.jsonl:1: not a sample"),
        ('{"input": "x", "outputs": []}', "validation.jsonl:1: input and answer_prefix must be strings"),
        ('{"input": "x", "outputs": [3]}', "outputs a list of non-empty strings"),
        ('{"input": "x", "outputs": [""]}', "outputs a list of non-empty strings"),
        ("\udcff", "cannot be read as UTF-8 text"),
        ("", "there is no sample in it"),
        (json.dumps(dict(input="word " * 6000, outputs=["x"])), "exceed the model's context of 4096"),
    ],
    ids=range(8),
)
def test_malformed_samples_are_named(ruler, tmp_path, text, culprit):
    file = tmp_path / "samples/720/data/niah_multiquery/validation.jsonl"
    file.parent.mkdir(parents=True)
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    done = ruler(tasks="niah_multiquery", data=tmp_path / "samples", essays=None)
    assert done.returncode == 2
    assert culprit in done.stderr
    assert not (tmp_path / "out").exists()


def test_qa_without_its_file_is_skipped_with_a_line(ruler, tmp_path):
    done = ruler(tasks="niah_single_1,qa_1,qa_2", samples=1)
    assert done.returncode == 0, done.stderr
    assert "qa_1 is skipped: the hub is out of reach; get the official file and pass --qa-squad" in done.stdout
    assert "qa_2 is skipped" in (tmp_path / "out/report.md").read_text()


def test_a_run_grows_and_changed_samples_are_refused(ruler, tmp_path):
    file = tmp_path / "data/720/data/niah_multiquery/validation.jsonl"
    file.parent.mkdir(parents=True)
    texts = [f"The number for a is: {number}. What is it?" for number in range(4)]

    def write(some):
        file.write_text("".join(json.dumps(dict(input=text, outputs=["1"])) + "\n" for text in some))
        return dict(tasks="niah_multiquery", data=tmp_path / "data", essays=None, policies="full")

    assert ruler(**write(texts[:2]), samples=2).returncode == 0
    first = rows(tmp_path / "out")
    assert ruler(**write(texts), samples=4).returncode == 0
    assert rows(tmp_path / "out")[:2] == first
    assert len(rows(tmp_path / "out")) == 4
    refused = ruler(**write([*texts[:3], "Another?"]), samples=4)
    assert refused.returncode == 2
    assert "those of task niah_multiquery, length 720, index 3 have changed; choose another --out" in refused.stderr
    assert ruler("--fresh", **write([*texts[:3], "Another?"]), samples=1).returncode == 0
    assert len(rows(tmp_path / "out")) == 1


@pytest.mark.parametrize("change", [dict(input="a \ud83d"), dict(outputs=["\udc00"]), dict(answer_prefix="\ud800x")])
def test_samples_that_no_tokenizer_takes_are_named(ruler, tmp_path, change):
    file = tmp_path / "data/720/data/niah_multiquery/validation.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(dict(input="a", outputs=["b"], answer_prefix="c") | change) + "\n")
    done = ruler(tasks="niah_multiquery", data=tmp_path / "data", essays=None)
    assert done.returncode == 2
    assert "validation.jsonl:1: holds an unpaired surrogate" in done.stderr


@pytest.mark.parametrize(("prompt", "begins"), [("a b", True), ("<eos>a b", False), ("\n<eos>a b", False)])
def test_a_prompt_has_one_bos_and_no_eos_behind_it(tmp_path, prompt, begins):
    checkpoints.write_folder(tmp_path)
    around = {"SpecialToken": {"id": "<eos>", "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [around, {"Sequence": {"id": "A", "type_id": 0}}, around],
        "pair": [],
        "special_tokens": {"<eos>": {"id": "<eos>", "ids": [0], "tokens": ["<eos>"]}},
    }
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": template}))
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.bos_token = "<eos>"
    (ids,) = prompt_ids(tokenizer, [prompt])
    assert ids == [0] * begins + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert ids.count(0) == 1


def test_samples_may_begin_with_a_byte_order_mark(ruler, tmp_path):
    file = tmp_path / "data/720/data/niah_multiquery/validation.jsonl"
    file.parent.mkdir(parents=True)
    file.write_bytes(json.dumps(dict(input="a b", outputs=["b"])).encode("utf-8-sig"))
    assert ruler(tasks="niah_multiquery", data=tmp_path / "data", essays=None, policies="full").returncode == 0


def test_help_is_quick(run_module):
    began = time.monotonic()
    done = run_module("eval.ruler", "--help")
    assert done.returncode == 0
    assert "--policies" in done.stdout
    assert time.monotonic() - began < 2
