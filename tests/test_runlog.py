"""The log of results: what it reads back, and what it refuses."""

import json

import pytest

from eval.ruler import samples
from eval.ruler.tasks.base import Sample
from recyc_jax.commands import locks
from recyc_jax.commands.run_log import RunLog


@pytest.fixture(autouse=True)
def released():
    yield
    locks.release()


def row(index, prediction="x"):
    return dict(task="vt", index=index, prediction=prediction)


def open_log(folder, **configuration):
    return RunLog(folder, configuration, ("task", "index"))


def test_rows_come_back_whatever_is_in_them(tmp_path):
    odd = [row(0, "line\u2028separator"), row(1, "next\x85line"), row(2, "new\nline")]
    log = open_log(tmp_path, seed=1)
    log.append(odd)
    locks.release()
    again = open_log(tmp_path, seed=1)
    assert again.rows == odd
    assert ("vt", 1) in again
    assert ("vt", 3) not in again


def test_a_row_that_is_there_twice_counts_once(tmp_path):
    open_log(tmp_path).append([row(0), row(1)])
    locks.release()
    file = tmp_path / "results.jsonl"
    file.write_text(file.read_text() * 2)
    assert open_log(tmp_path).rows == [row(0), row(1)]


def test_two_runs_cannot_write_one_folder(tmp_path):
    open_log(tmp_path)
    with pytest.raises(ValueError, match="another run is writing there"):
        open_log(tmp_path)
    locks.release()
    open_log(tmp_path)


def test_a_folder_without_rows_takes_any_configuration(tmp_path):
    open_log(tmp_path, seed=1)
    locks.release()
    log = open_log(tmp_path, seed=2)
    log.append([row(0)])
    locks.release()
    with pytest.raises(ValueError, match="seed was 2 and is 1 now"):
        open_log(tmp_path, seed=1)


@pytest.mark.parametrize("line", ["[]", "{}", "nonsense"])
def test_a_line_that_is_no_result_is_named(tmp_path, line):
    log = open_log(tmp_path)
    log.append([row(0)])
    locks.release()
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"results\.jsonl:2 is no result"):
        open_log(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{", None])
def test_a_damaged_configuration_is_named(tmp_path, content):
    log = open_log(tmp_path)
    log.append([row(0)])
    locks.release()
    if content is None:
        (tmp_path / "config.json").unlink()
    else:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        open_log(tmp_path)


def test_dumped_samples_come_back_whatever_is_in_them(tmp_path):
    odd = Sample(0, "a\u2028b\x85c", " d", ("e\u2029",), 9)
    samples.write(tmp_path, 100, "vt", [odd], 0, len)
    (back,) = samples.read(tmp_path, 100, "vt", 5, lambda texts: [len(text) for text in texts], 3, None)
    assert (back.input, back.answer_prefix, back.outputs) == (odd.input, odd.answer_prefix, odd.outputs)
    assert back.length == len(odd.prompt) + 3
    assert json.loads((tmp_path / "100/data/vt/validation.jsonl").read_text(encoding="utf-8"))["index"] == 0
