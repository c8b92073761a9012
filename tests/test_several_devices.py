"""Several devices and several hosts do what one does: the law, on devices that a CPU plays."""

import json
import os
import socket
import subprocess
import sys

import pytest
from checkpoints import write_folder

from eval import backend
from recyc_jax import LlamaConfig

SAME = """
import sys
import jax, numpy as np
import recyc_jax as rj
from recyc_jax import pretrained, sharding
from pathlib import Path

jax.config.update("jax_default_matmul_precision", "highest")
folder = Path(sys.argv[1])
config = pretrained.read_config(folder)
prompts = np.asarray(jax.random.randint(jax.random.key(0), (4, 40), 3, config.vocab_size))
policies = [rj.parse_policy(text) for text in sys.argv[2:]]

def scores(params):
    return [rj.score(params, config, prompts, policy=policy, context_length=20) for policy in policies]

alone = scores(pretrained.load_params(folder, config))
with jax.set_mesh(sharding.mesh(2, 1, 2)) as mesh:
    params = pretrained.load_params(folder, config, mesh=sharding.mesh(2, 1, 2))
    parts = params["layers_0"]["attention"]["q_proj"]["kernel"].addressable_shards[0].data.shape
    assert parts[1] * 2 == params["layers_0"]["attention"]["q_proj"]["kernel"].shape[1], parts
    for one, other, policy in zip(alone, scores(params), policies):
        assert len(other.sharding.device_set) == 4, other.sharding
        np.testing.assert_allclose(one, other, atol=2e-4, err_msg=str(policy))
"""


def test_four_devices_are_one(tmp_path):
    write_folder(tmp_path / "model")
    policies = ["full", "recycled:budget=8,stride=4", "recycled:budget=8,check_every=3,threshold=0.5", "h2o:budget=8"]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run(
        [sys.executable, "-c", SAME, str(tmp_path / "model"), *policies],
        env=os.environ | flags,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]


def test_two_hosts_write_one_result(tmp_path):
    """Real processes that find each other by the environment; the folder is the first one's alone."""
    write_folder(tmp_path / "model")

    def start(out, **env):
        command = ["eval.ruler", "--model", tmp_path / "model", "--tasks", "niah_single_1", "--lengths", "1024"]
        command += ["--samples", "3", "--batch-size", "2", "--out", out, "--backend", "cpu", "--policies"]
        command += ["full", "recycled:budget=0.25,stride=10"]
        return subprocess.Popen(
            [sys.executable, "-m", *map(str, command)],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"} | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    many = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    # the second one is told a folder of its own, and must not touch it
    runs = [start(tmp_path / f"out{number}", **many, JAX_PROCESS_ID=str(number)) for number in range(2)]
    said = [run.communicate(timeout=300) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert not (tmp_path / "out1").exists()
    alone = start(tmp_path / "alone")
    alone.communicate(timeout=300)
    assert alone.returncode == 0

    def rows(folder):
        found = [json.loads(line) for line in (tmp_path / folder / "results.jsonl").read_text().splitlines()]
        return [{name: row[name] for name in row if name != "seconds"} for row in found]

    assert rows("out0") == rows("alone")
    assert len(rows("alone")) == 6
    # a fault that only the first process can see ends both, with one line each
    (tmp_path / "out0" / "results.jsonl").write_text("{}\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        many["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{free.getsockname()[1]}"
    runs = [start(tmp_path / f"out{number}", **many, JAX_PROCESS_ID=str(number)) for number in range(2)]
    said = [run.communicate(timeout=300)[1] for run in runs]
    assert [run.returncode for run in runs] == [2, 2], said
    assert all("results.jsonl:1 is no result" in text for text in said)


def test_a_lone_address_is_an_error(run_module):
    ran = run_module("eval.ruler", env={"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1"})
    assert ran.returncode == 2
    assert "whole numbers in JAX_NUM_PROCESSES and JAX_PROCESS_ID go with it" in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1


def test_a_share_that_does_not_divide_is_an_error():
    with pytest.raises(ValueError, match="--tensor 2 does not divide the 1 devices"):
        backend.mesh(2, LlamaConfig.tiny())
    assert backend.mesh(0, LlamaConfig.tiny()) is None
