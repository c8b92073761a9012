"""This project, installed in another environment, runs without the checkout, and beside modules of its packages' names."""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import checkpoints
import pytest
from conftest import ROOT, environment


@pytest.fixture
def source(tmp_path):
    """A copy of the checkout, so that files of an earlier build in it are not packaged."""
    return shutil.copytree(
        ROOT, tmp_path / "source", ignore=shutil.ignore_patterns("build", "*.egg-info", ".*", "results", "__pycache__")
    )


@pytest.fixture
def python(tmp_path):
    """The Python of a new environment that borrows this one's packages."""
    base = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", base], check=True)
    paths = sysconfig.get_paths("venv", {"base": str(base), "platbase": str(base)})
    (Path(paths["purelib"]) / "zz_borrowed.pth").write_text(sysconfig.get_paths()["purelib"])
    return Path(paths["scripts"]) / "python"


@pytest.fixture
def elsewhere(tmp_path):
    """A user's folder with a train.py and an eval.py."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for name in ("train.py", "eval.py"):
        (folder / name).write_text("print('mine')")
    return folder


def pip(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "pip", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def run(python, folder, *arguments):
    env = environment()
    del env["PYTHONPATH"]  # which names the checkout
    command = [str(python), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_installed_wheel_runs_outside_the_checkout(tmp_path, source, python, elsewhere):
    """The wheel is built from a source distribution of a tagged version, as a release is."""
    for words in ("init -q", "add .", "commit -q -m release", "tag v9.8.7"):
        git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *words.split()]
        subprocess.run(git, cwd=source, check=True)
    built = subprocess.run(
        [sys.executable, "-m", "build", "--outdir", tmp_path, source], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stdout + built.stderr
    assert (tmp_path / "recyc_jax-9.8.7.tar.gz").exists()
    wheel = tmp_path / "recyc_jax-9.8.7-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    hook = {"recyc_jax_startup.pth", "recyc_jax_startup.py"}
    assert tops == {"recyc_jax", "train", "eval", *hook, f"{wheel.name.split('-py3')[0]}.dist-info"}
    assert {"eval/ruler/tasks/niah.py", "recyc_jax/policies/recycled.py", "train/presets/paper.yaml"} <= set(names)
    pip("--python", python, "install", "--quiet", "--no-deps", wheel)
    assert run(python, elsewhere, "-c", "import recyc_jax; print(recyc_jax.__version__)") == "9.8.7\n"
    assert str(tmp_path / "environment") in run(python, elsewhere, "-c", "import recyc_jax; print(recyc_jax.__file__)")
    checkpoints.write_folder(tmp_path / "model")
    flags = ("--lengths", 720, "--samples", 1, "--batch-size", 1, "--policies", "full")
    run(python, elsewhere, "-m", "eval.ruler", "--model", tmp_path / "model", "--tasks", "niah_single_1", *flags)
    assert (elsewhere / "results/ruler/report.md").exists()
    assert run(python, elsewhere, "-c", "import train, eval") == "mine\nmine\n"
    # a user's own command of that name comes first in Python's search, unless -P keeps the current folder out of it
    (elsewhere / "eval.py").unlink()
    (elsewhere / "eval").mkdir()
    (elsewhere / "eval" / "__init__.py").touch()
    mine = elsewhere / "eval" / "ruler.py"
    mine.write_text("print('mine')")
    for flags, expected in (((), "mine\n"), (("-P",), "usage: python -m eval.ruler")):
        assert run(python, elsewhere, *flags, "-m", "eval.ruler", "--help").startswith(expected)
    assert mine.read_text() == "print('mine')"
    assert {path.name for path in (elsewhere / "eval").iterdir()} - {"__pycache__"} == {"__init__.py", "ruler.py"}


def test_an_editable_install_runs_from_its_checkout(source, python, elsewhere):
    pip("--python", python, "install", "--quiet", "--no-deps", "--editable", source)
    (source / "train" / "added.py").write_text("print('added')")
    assert run(python, elsewhere, "-m", "train.added") == "added\n"
    assert run(python, elsewhere, "-m", "eval.ruler", "--help").startswith("usage: python -m eval.ruler")
    assert run(python, elsewhere, "-c", "import train, eval") == "mine\nmine\n"
