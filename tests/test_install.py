"""A wheel of this project, installed in another environment, runs without the checkout."""

import shutil
import subprocess
import sys
import zipfile

import checkpoints
from conftest import ROOT, environment


def test_an_installed_wheel_runs_outside_the_checkout(tmp_path):
    source = tmp_path / "source"  # a copy, so that files of an earlier build in the checkout are not packaged
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns("build", "*.egg-info", ".*", "results"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, source]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("recyc_jax-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"recyc_jax", "train", "eval", f"{wheel.name.split('-py3')[0]}.dist-info"}
    assert {"eval/ruler/tasks/niah.py", "recyc_jax/policies/recycled.py", "train/__init__.py"} <= set(names)
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel]
    subprocess.run(install, check=True, capture_output=True)
    checkpoints.write_folder(tmp_path / "model")
    env = environment() | {"PYTHONPATH": str(site)}
    command = [sys.executable, "-m", "eval.ruler", "--model", tmp_path / "model", "--tasks", "niah_single_1"]
    done = subprocess.run(
        [*map(str, command), "--lengths", "720", "--samples", "1", "--batch-size", "1", "--policies", "full"],
        cwd=elsewhere,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (elsewhere / "results/ruler/report.md").exists()
    # a user's own folder of that name comes first in Python's search, unless -P keeps the current folder out of it
    (elsewhere / "eval").mkdir()
    (elsewhere / "eval" / "__init__.py").touch()
    mine = elsewhere / "eval" / "ruler.py"
    mine.write_text("print('mine')")
    for flags, expected in (((), "mine\n"), (("-P",), "usage: python -m eval.ruler")):
        command = [sys.executable, *flags, "-m", "eval.ruler", "--help"]
        shown = subprocess.run(command, cwd=elsewhere, env=env, capture_output=True, text=True, check=True).stdout
        assert shown.startswith(expected)
    assert mine.read_text() == "print('mine')"
    assert {path.name for path in (elsewhere / "eval").iterdir()} - {"__pycache__"} == {"__init__.py", "ruler.py"}
