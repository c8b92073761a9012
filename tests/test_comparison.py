"""`python -m eval.comparison`: means, paired differences and figures over the rows of RULER runs."""

import json
import lzma

import pytest

from eval.comparison import tables
from recyc_jax.shapes import SHAPES

POLICIES = (
    "full",
    "lookahead:budget=1024,stride=50",
    "recycled:budget=0.125,check_every=5,threshold=0.9",
    "snapkv:budget=9",
)


def row(policy, task, index, score, length=32768):
    full_steps = {"f": 99, "l": 2, "r": 10, "s": 0}[policy[0]]
    return dict(policy=policy, task=task, length=length, index=index, score=score, steps=99, full_steps=full_steps)


def some_rows():
    return [
        row(policy, task, index, (index % 2 + (task == "vt")) / 2 - 0.5 * (policy != "full") * (index == 3))
        for policy in POLICIES
        for task in ("niah_multivalue", "vt")
        for index in range(4)
    ]


@pytest.fixture
def files(tmp_path):
    """Half of the rows as they are, half compressed."""
    rows = [json.dumps(one) + "\n" for one in some_rows()]
    (tmp_path / "a.jsonl").write_text("".join(rows[::2]))
    (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress("".join(rows[1::2]).encode()))
    return [tmp_path / "a.jsonl", tmp_path / "b.jsonl.xz"]


def test_means_and_differences(files):
    results = tables.Results.read(files, "all")
    assert results.tasks == ["niah_multivalue", "vt"]
    mean, error = results.mean(32768, "full")
    assert mean == 50  # 25 and 75
    assert error == pytest.approx(100 * (2 * (1 / 12) / 4) ** 0.5 / 2)  # of 0, 1/2, 0, 1/2 the variance is 1/12
    assert results.difference(32768, "full") == (0, 0)
    gap, error = results.difference(32768, POLICIES[1])
    assert gap == -12.5  # one of four samples of each task lost 50
    assert error == pytest.approx((2 * 12.5**2) ** 0.5 / 2)
    assert results.strides[32768, POLICIES[1]] == 99 / 2
    assert results.mean(4096, "full") is None


def test_points_read_what_was_measured(files):
    found = {
        point.text: point for point in tables.points(tables.Results.read(files, "vt"), 32768, SHAPES["qwen2.5-0.5b"])
    }
    assert list(found) == list(POLICIES)
    assert found["full"].tokens == 32768
    assert found["snapkv:budget=9"].tokens == 9
    dynamic = found[POLICIES[2]]
    assert dynamic.stride == 9.9
    assert dynamic.tokens == pytest.approx(4096 + (32768 - 4096) / 9.9)


def test_the_command(files, call_module, tmp_path):
    ran = call_module("eval.comparison", *files, "--tasks", "all", "--out", tmp_path / "out")
    assert ran.returncode == 0, ran.stderr
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "| `lookahead:budget=1024,stride=50` | 37.5 ± 8.8 | 75.0% | -12.5 ± 17.3 | 1700 | 49.5 | 4 |" in text
    assert (tmp_path / "out" / "tokens_read.png").stat().st_size > 5000
    assert (tmp_path / "out" / "stride.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "name one or more files of rows"),
        (["nowhere.jsonl"], "nowhere.jsonl: No such file or directory"),
        (["a.jsonl", "--tasks", "cwe"], "--tasks cwe: there are only rows of niah_multivalue, vt"),
        (["a.jsonl", "--model", "gpt"], "--model gpt is unknown; there is smollm2-135m"),
        (["other.jsonl"], "other.jsonl: holds rows that eval.ruler does not write"),
        (["torn.jsonl.xz"], "torn.jsonl.xz"),
    ],
)
def test_bad_input_ends_with_one_line(files, flags, message, call_module, tmp_path):
    (tmp_path / "other.jsonl").write_text('{"policy": "full"}\n')
    (tmp_path / "torn.jsonl.xz").write_bytes(files[1].read_bytes()[:40])
    flags = [tmp_path / flag if ".jsonl" in flag else flag for flag in flags]
    ran = call_module("eval.comparison", *flags, "--out", tmp_path / "out")
    assert ran.returncode != 0
    assert message in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "comparison.md").exists()
