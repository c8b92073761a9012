"""A wheel of this project, installed elsewhere, runs without the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile

import checkpoints
from conftest import ROOT


def test_an_installed_wheel_runs_outside_the_checkout(tmp_path):
    source = tmp_path / "source"  # a copy: what an earlier build left in the checkout must not come along
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns("build", "*.egg-info", ".*", "results"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, source]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("recyc_jax-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"recyc_jax", "train", "eval", f"{wheel.name.split('-py3')[0]}.dist-info"}
    assert {"eval/tasks/niah.py", "recyc_jax/policies/recycled.py", "train/__init__.py"} <= set(names)
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel]
    subprocess.run(install, check=True, capture_output=True)
    checkpoints.write_folder(tmp_path / "model")
    command = [sys.executable, "-m", "eval.ruler", "--model", tmp_path / "model", "--tasks", "vt", "--lengths", "1500"]
    done = subprocess.run(
        [*map(str, command), "--samples", "1", "--batch-size", "1"],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (elsewhere / "results/ruler/report.md").exists()
