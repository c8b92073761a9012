"""The start-up hook: this project's commands in a folder that has modules named `train` and `eval` of its own."""

import os
import shutil
import subprocess
import sys
import sysconfig

import pytest
from conftest import ROOT

import recyc_jax_startup

OURS = "import eval\nprint('ours', eval.whose)"
MINE = "print('mine')"


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The Python of an environment that holds the hook and two commands, of which `eval.old` needs `train` as well."""
    base = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", base], check=True)
    paths = sysconfig.get_paths("venv", {"base": str(base), "platbase": str(base)})
    for name in ("recyc_jax_startup.py", "recyc_jax_startup.pth"):
        shutil.copy(ROOT / name, paths["purelib"])
    write(paths["purelib"], "train/__init__.py", "whose = 'ours'")
    write(paths["purelib"], "eval/__init__.py", "whose = 'ours'")
    write(paths["purelib"], "train/go.py", OURS)
    write(paths["purelib"], "train/child.py", "import subprocess, sys\nsubprocess.run([sys.executable, 'tool.py'])")
    write(paths["purelib"], "eval/old/__init__.py", "")
    write(paths["purelib"], "eval/old/__main__.py", "import train.go")
    return os.path.join(paths["scripts"], "python")


@pytest.fixture
def own(tmp_path):
    """A user's folder with a train.py and an eval.py, and a script and a module that import them."""
    for name in ("train.py", "eval.py"):
        write(tmp_path, name, "whose = 'mine'")
    write(tmp_path, "tool.py", "import eval, train\nprint(train.whose, eval.whose)")
    return tmp_path


def write(folder, name, text):
    path = os.path.join(folder, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        file.write(text)


def shown(python, folder, command, **env):
    """What `python` prints in that folder, to stderr too: there Python would report a fault of the hook. In `command` a
    bar stands for a space within a word."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    words = [python, *(word.replace("|", " ") for word in command.split())]
    done = subprocess.run(words, cwd=folder, env=clean | env, capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).strip()


@pytest.mark.parametrize(
    "command",
    [
        "-m train.go",
        "-mtrain.go",
        "-um train.go -m tool",
        "-umtrain.go",
        "-X dev -W ignore -m train.go",
        "-P -m train.go",
        "-I -m train.go",
        "-m eval.old --flag",
    ],
)
def test_a_command_runs_beside_modules_of_its_packages_names(python, own, command):
    assert shown(python, own, command) == "ours ours"


@pytest.mark.parametrize("command", ["tool.py -m train.go", "-m tool", "-c import|tool -m train.go"])
def test_every_other_start_finds_the_users_modules(python, own, command):
    assert shown(python, own, command).startswith("mine mine")


def test_the_users_packages_run_their_own_commands(python, own):
    (own / "train.py").unlink()
    write(own, "train/__init__.py", "")
    write(own, "train/other.py", MINE)
    assert shown(python, own, "-m train.other") == "mine"
    assert shown(python, own, "-m train.go") == "ours ours"
    write(own, "train/go.py", MINE)
    assert shown(python, own, "-m train.go") == "mine"
    assert shown(python, own, "-P -m train.go") == "ours ours"
    assert shown(python, own, "-m train.go", PYTHONSAFEPATH="1") == "ours ours"
    write(own, "eval/old/__main__.py", MINE)
    (own / "eval.py").rename(own / "eval/__init__.py")
    assert shown(python, own, "-m eval.old") == "mine"


def test_folders_of_the_environments_path_count_too(python, own, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    assert shown(python, elsewhere, "-m train.go", PYTHONPATH=str(own)) == "ours ours"
    (own / "train.py").unlink()
    write(own, "train/__init__.py", "")
    write(own, "train/go.py", MINE)
    assert shown(python, elsewhere, "-m train.go", PYTHONPATH=str(own)) == "mine"


def test_a_process_that_a_command_starts_is_not_changed(python, own):
    assert shown(python, own, "-m train.child") == "mine mine"


def test_an_environment_that_outlives_the_checkout_starts_in_silence(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path], check=True)
    paths = sysconfig.get_paths("venv", {"base": str(tmp_path), "platbase": str(tmp_path)})
    shutil.copy(ROOT / "recyc_jax_startup.pth", paths["purelib"])
    python = os.path.join(paths["scripts"], "python")
    assert shown(python, tmp_path, "-c print(1)") == "1"
    (message,) = shown(python, tmp_path, "-m train.go").splitlines()
    assert "No module named 'train'" in message


def test_the_hook_looks_at_the_commands_that_exist():
    """Without a list of names: a new command is found as the old ones are."""
    for name in ("train.continued_pretrain", "train.report", "eval.ruler", "eval.speed", "eval.training_step"):
        assert recyc_jax_startup.is_ours(name, ["elsewhere", str(ROOT)])
    for name in ("", "train", "eval.missing", "recyc_jax.generation", "tests.conftest", "train.presets"):
        assert not recyc_jax_startup.is_ours(name, ["elsewhere", str(ROOT)])


def test_importing_the_hook_changes_nothing():
    assert recyc_jax_startup.Finder not in sys.meta_path
