"""Files and folders of results on ordinary machines: full disks, odd names, notebooks, torn lines, no locks."""

import errno
import fcntl
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from recyc_jax.commands import files, json_lines, locks, numbers, plotting


@pytest.mark.parametrize("address", ["gs://bucket/a", "s3://bucket", "hdfs://host/x"])
def test_addresses_are_refused(address):
    from pathlib import Path

    with pytest.raises(ValueError, match=rf"--out {address}: results are written to a folder of this machine"):
        files.writable_folder("--out", Path(address))


def test_a_colon_in_a_folder_name_is_no_address(tmp_path):
    assert files.writable_folder("--out", tmp_path / "a:b/c").is_dir()


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    files.write_text(tmp_path / "a.json", "before")
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", lambda *args: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(OSError, match="full"):
            files.write_text(tmp_path / "a.json", "after")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "before"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_known_behind_other_errors(number):
    behind = RuntimeError("saving failed")
    behind.__cause__ = OSError(number, os.strerror(number))
    assert files.no_space(behind)
    assert files.no_space(ValueError("I/O error: No space left on device (os error 28)"))
    assert not files.no_space(OSError(errno.EACCES, "Permission denied"))


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "Qt9Agg", "", None])
def test_figures_need_no_back_end(tmp_path, backend):
    """In a process of its own, because matplotlib reads the variable when it is imported."""
    code = (
        "import os, pathlib; from recyc_jax.commands import plotting\n"
        "@plotting.plot\n"
        "def draw(path):\n"
        "    from matplotlib.figure import Figure\n"
        "    Figure().savefig(path)\n"
        "draw(pathlib.Path('figure.png')); print(os.environ.get('MPLBACKEND'))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    environment |= {"PYTHONPATH": str(ROOT)} | ({} if backend is None else {"MPLBACKEND": backend})
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (tmp_path / "figure.png").is_file(), done.stderr
    assert done.stdout.strip() == str(backend)


def test_a_figure_that_fails_costs_the_figure(tmp_path, capsys):
    @plotting.plot
    def draw(path):
        raise RuntimeError("no fonts\nat all")

    draw(tmp_path / "figure.png")
    assert capsys.readouterr().err == f"WARNING: {tmp_path}/figure.png was not drawn: no fonts\n"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys, number):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    locks.claim(tmp_path / ".lock", tmp_path)
    assert "has no locks: make sure that no other run writes there" in capsys.readouterr().err
    with locks.waiting(tmp_path / ".lock", "someone else"):
        pass


def test_a_lock_that_another_process_holds_is_waited_for(tmp_path, capsys, monkeypatch):
    held = os.open(tmp_path / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_EX)
    monkeypatch.setattr("time.sleep", lambda seconds: os.close(held))
    with locks.waiting(tmp_path / ".lock", "another process works"):
        assert capsys.readouterr().err == "waits: another process works\n"


def test_rows_are_added_after_earlier_ones_and_torn_lines_go(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    for value in (1, 2):
        with json_lines.appending(file) as add:
            add({"value": value})
        with file.open("a") as torn:
            torn.write('{"value": ')
    assert [row["value"] for row in json_lines.read(file)] == [1, 2]
    assert "the last line is torn and is passed over" in capsys.readouterr().err
    file.write_text('{"a": 1}\nnonsense\n{"b": 2}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:2 is no JSON object"):
        json_lines.read(file)


def test_numbers_that_are_not_finite():
    assert numbers.perplexity(1e9) == float("inf")
    assert numbers.finite(numbers.perplexity(1e9)) is None
    assert numbers.finite(float("nan"), 3) is None
    assert numbers.finite(1.23456, 2) == 1.23
    assert json.dumps(numbers.finite(float("inf"))) == "null"
    assert (numbers.shown(None, 2), numbers.shown(2.0, 2)) == ("not finite", "2.00")
