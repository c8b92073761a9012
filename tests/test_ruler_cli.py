"""`python -m eval.ruler` as users run it: real processes, on a tiny random checkpoint in a folder."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import checkpoints
import pytest
from conftest import ROOT

TASKS = "niah_single_1,niah_multiquery,vt"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    checkpoints.write_folder(folder)
    (folder / "essays.txt").write_text(checkpoints.TEXT * 200)
    return folder


@pytest.fixture
def ruler(run_module, model, tmp_path):
    return ruler_by(run_module, model, tmp_path)


@pytest.fixture
def refused(call_module, model, tmp_path):
    """`ruler` for input that ends before there is work."""
    return ruler_by(call_module, model, tmp_path)


def ruler_by(run_module, model, tmp_path):
    def run(*more, **options):
        default = dict(model=model, tasks=TASKS, lengths="2000", samples=3, batch_size=2, out=tmp_path / "out")
        default["essays"] = model / "essays.txt"
        flags = [
            part for name, value in (default | options).items() if value is not None for part in (f"--{name}", value)
        ]
        return run_module("eval.ruler", *flags, *more)

    return run


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """One whole run that several tests look at."""
    out = tmp_path_factory.mktemp("finished") / "deep" / "out"
    command = [sys.executable, "-m", "eval.ruler", "--model", model, "--tasks", TASKS, "--lengths", "2000,2100"]
    command += ["--samples", 3, "--batch-size", 2, "--out", out, "--essays", model / "essays.txt", "--policies"]
    command += ["full", "recycled:budget=0.125,stride=5", "recycled:budget=4000,stride=50"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return out, done


def rows(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_a_whole_run(finished):
    out, done = finished
    found = rows(out)
    assert len(found) == 3 * 2 * 3 * 3  # tasks, lengths, samples, policies
    assert set(found[0]) >= {"policy", "task", "length", "index", "prompt_tokens", "prediction", "references", "score"}
    assert {row["index"] for row in found} == {0, 1, 2}
    for row in found:
        assert row["prompt_tokens"] < row["length"]
        assert "One of the special magic" not in row["prediction"] or row["score"] < 1
    summary = json.loads((out / "summary.json").read_text())
    assert len(summary) == 3 * 2 * 3
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
    assert "| task | `full` | `recycled:budget=0.125,stride=5` | `recycled:budget=4000,stride=50` |" in report
    assert "`recycled:budget=0.125,stride=5` at 2000: 250 entries a partial step, 0.125 of the length" in report
    assert "- dtype: float32" in report
    assert "3 tasks of 13, 3 samples each" in report
    assert "| `recycled:budget=4000,stride=50` | 0.0 | 0.0 to 0.0 | " in report
    assert all(f"| {name} | " in report for name in (*TASKS.split(","), "mean"))
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "RULER at 2100 tokens" in done.stdout
    assert not list(out.glob(".*"))


def test_a_budget_above_the_length_predicts_what_full_attention_predicts(finished):
    predictions = {}
    for row in rows(finished[0]):
        predictions.setdefault(row["policy"], {})[row["task"], row["length"], row["index"]] = row["prediction"]
    assert predictions["full"] == predictions["recycled:budget=4000,stride=50"]
    assert predictions["full"] != predictions["recycled:budget=0.125,stride=5"]


def test_dumped_samples_give_the_same_results(ruler, finished, tmp_path):
    dumped = ruler(lengths="2000,2100", **{"dump-samples": tmp_path / "samples"})
    assert dumped.returncode == 0, dumped.stderr
    file = tmp_path / "samples/2000/data/vt/validation.jsonl"
    first = json.loads(file.read_text().splitlines()[0])
    assert set(first) == {"index", "input", "outputs", "length", "length_w_model_temp", "answer_prefix"}
    needle = json.loads((tmp_path / "samples/2000/data/niah_single_1/validation.jsonl").read_text().splitlines()[0])
    assert 0 < needle["token_position_answer"] < needle["length"]
    assert first["length"] == first["length_w_model_temp"] <= 2000
    again = ruler(lengths="2000,2100", policies="full", data=tmp_path / "samples", essays=None)
    assert again.returncode == 0, again.stderr
    expected = [row for row in rows(finished[0]) if row["policy"] == "full"]
    keys = ["task", "length", "index", "prompt_tokens", "prediction", "references", "score"]
    assert [[row[key] for key in keys] for row in rows(tmp_path / "out")] == [
        [row[key] for key in keys] for row in expected
    ]


def test_a_killed_run_goes_on_where_it_stopped(finished, model, tmp_path):
    out = tmp_path / "out"
    flags = [
        "--tasks",
        TASKS,
        "--lengths",
        "2000,2100",
        "--samples",
        3,
        "--batch-size",
        2,
        "--model",
        model,
        "--out",
        out,
    ]
    flags += ["--essays", model / "essays.txt", "--policies"]
    flags += ["full", "recycled:budget=0.125,stride=5", "recycled:budget=4000,stride=50"]
    command = [sys.executable, "-m", "eval.ruler", *map(str, flags)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env, cwd=ROOT)
    results = out / "results.jsonl"
    deadline = time.monotonic() + 240
    while not (results.exists() and results.read_text().count("\n") >= 10):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = results.read_text()
    assert before.count("\n") < 54
    with results.open("a") as file:  # a line cut short by the kill
        file.write('{"policy": "full", "task": "v')
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert results.read_text().startswith(before)

    def essence(row):
        return {name: value for name, value in row.items() if name != "seconds"}

    key = lambda row: (row["policy"], row["task"], row["length"], row["index"])  # noqa: E731
    got, expected = (sorted(map(essence, rows(folder)), key=key) for folder in (out, finished[0]))
    assert got == expected
    third = subprocess.run(command, capture_output=True, text=True, env=env, check=False, cwd=ROOT)
    assert third.returncode == 0
    assert len(rows(out)) == 54


@pytest.mark.parametrize(
    ("options", "name"), [(dict(seed=7), "seed was 42"), (dict(dtype="bfloat16"), "dtype was 'float32'")], ids=str
)
def test_another_configuration_in_the_folder_is_refused_by_name(ruler, finished, options, name):
    out, _ = finished
    before = (out / "results.jsonl").read_bytes()
    policies = ["full", "recycled:budget=0.125,stride=5", "recycled:budget=4000,stride=50"]
    done = ruler("--policies", *policies, out=out, lengths="2000,2100", **options)
    assert done.returncode == 2
    assert f"holds another configuration: {name}" in done.stderr
    assert (out / "results.jsonl").read_bytes() == before


def test_an_interrupt_says_how_to_go_on(model, tmp_path):
    command = [
        sys.executable,
        "-m",
        "eval.ruler",
        "--model",
        model,
        "--tasks",
        "vt",
        "--lengths",
        2000,
        "--samples",
        3000,
    ]
    command += ["--batch-size", 1, "--out", tmp_path / "out"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env, cwd=ROOT
    )
    try:
        deadline = time.monotonic() + 240
        while not ((tmp_path / "out/results.jsonl").exists() and (tmp_path / "out/results.jsonl").stat().st_size):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130
    assert b"interrupted; the same command goes on with what" in error
    assert all(row["task"] == "vt" for row in rows(tmp_path / "out"))


def test_bad_input_reads_no_weights(ruler, model, tmp_path):
    """A model without weights: what is wrong with the input is said first, and the folder is not claimed for good."""
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (broken / "model.safetensors").unlink()
    assert "is below the minimum" in ruler(model=broken, lengths="100").stderr
    assert "model.safetensors" in ruler(model=broken).stderr
    done = ruler(tasks="vt", samples=1)
    assert done.returncode == 0, done.stderr


def test_the_chat_template(ruler, tmp_path):
    done = ruler(template="chat", **{"dump-samples": tmp_path / "samples"})
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "samples/2000/data/vt/validation.jsonl").read_text().splitlines()[0])
    assert row["input"].startswith("<user>Memorize")
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
def test_bad_input_ends_with_one_line(refused, options, culprit):
    done = refused(**options)
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
        ("\udcff", "not UTF-8"),
        ("", "there is no sample in it"),
        (json.dumps(dict(input="word " * 6000, outputs=["x"])), "exceed the model's context of 4096"),
    ],
    ids=range(8),
)
def test_malformed_samples_are_named(refused, tmp_path, text, culprit):
    file = tmp_path / "samples/2000/data/vt/validation.jsonl"
    file.parent.mkdir(parents=True)
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    done = refused(tasks="vt", data=tmp_path / "samples", essays=None)
    assert done.returncode == 2
    assert culprit in done.stderr
    assert not (tmp_path / "out").exists()


def test_qa_without_its_file_is_skipped_with_a_line(ruler, tmp_path):
    done = ruler(tasks="niah_single_1,qa_1,qa_2", samples=1)
    assert done.returncode == 0, done.stderr
    assert "qa_1 is skipped: the hub is out of reach; get the official file and pass --qa-squad" in done.stdout
    assert "qa_2 is skipped" in (tmp_path / "out/report.md").read_text()


def test_help_is_quick(run_module):
    began = time.monotonic()
    done = run_module("eval.ruler", "--help")
    assert done.returncode == 0
    assert "--policies" in done.stdout
    assert time.monotonic() - began < 2
