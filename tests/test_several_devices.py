"""Several devices and several hosts give the same results as one; the devices are simulated on a CPU."""

import json
import re
import socket
import subprocess
import sys
import types

import jax
import pytest
from checkpoints import write_folder
from conftest import environment

from recyc_jax import LlamaConfig, init_params, sharding
from recyc_jax.commands import backends

SAME = """
import sys
import jax, numpy as np
import recyc_jax as rj
from recyc_jax import sharding
from recyc_jax.loading import pretrained
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


@pytest.mark.parametrize("family", [None, "gemma3_text", pytest.param("phi3", marks=pytest.mark.slow)])
def test_four_devices_are_one(tmp_path, family):
    write_folder(tmp_path / "model", family=family)
    policies = ["recycled:budget=8,check_every=3,threshold=0.5", "h2o:budget=8"]
    ran = subprocess.run(
        [sys.executable, "-c", SAME, str(tmp_path / "model"), *policies],
        env=environment("--xla_force_host_platform_device_count=4"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]


def on_two_hosts():
    """The environment of processes that find each other on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    many = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    return many | {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}


def test_two_hosts_write_one_result(start_module, call_module, tmp_path):
    """Real processes find each other through the environment; only the first one writes to its folder."""
    write_folder(tmp_path / "model")

    def command(out):
        arguments = ["eval.ruler", "--model", tmp_path / "model", "--tasks", "niah_single_1", "--lengths", "720"]
        arguments += ["--samples", "3", "--batch-size", "2", "--out", tmp_path / out, "--backend", "cpu", "--policies"]
        return [*arguments, "full", "recycled:budget=0.25,stride=10"]

    # the second process gets a different --out, and must not touch it
    env = on_two_hosts()
    runs = [start_module(*command(f"out{number}"), env=env | {"JAX_PROCESS_ID": str(number)}) for number in range(2)]
    said = [run.communicate(timeout=300)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert not (tmp_path / "out1").exists()
    assert call_module(*command("alone")).returncode == 0

    def rows(folder):
        found = [json.loads(line) for line in (tmp_path / folder / "results.jsonl").read_text().splitlines()]
        return [{name: row[name] for name in row if name != "seconds"} for row in found]

    assert rows("out0") == rows("alone")
    assert len(rows("alone")) == 6


TELL = """
from recyc_jax.commands import hosts

hosts.join()
print(hosts.from_first(lambda: "hello"))

def fail():
    raise ValueError("seen by the first process only")

try:
    hosts.from_first(fail)
except ValueError as error:
    print(error)
"""


WINDOWS = """
from recyc_jax.commands import hosts

hosts.join()
import jax, numpy as np
import recyc_jax as rj
from recyc_jax import sharding
from train import evaluation

config, rows_here, prefill = rj.LlamaConfig.tiny(), [], rj.prefill

def watched(*args, **options):
    state = prefill(*args, **options)
    rows_here.append(state.cache.layers[0].stored_keys.addressable_shards[0].data.shape[0])
    return state

rj.prefill = watched
tokens = np.random.default_rng(0).integers(3, config.vocab_size, (6, 24)).astype(np.int32)
held_out = evaluation.HeldOut(tokens, ("a", "a", "a", "b", "b", "b"))
mesh = sharding.mesh(jax.device_count(), 1, 1)
with jax.set_mesh(mesh):
    params = jax.jit(lambda: rj.init_params(config, jax.random.key(0)), out_shardings=sharding.place_of("", 1))()
    policies = ["full", "recycled:budget=8,stride=3"]
    rows = evaluation.evaluate(params, config, held_out, policies, 6, 4, lambda: None)
    # arrays of which each process has a part
    spread = sharding.spread(tokens[:4], "B-", 4)
    rj.score(params, config, spread, policy="full", context_length=20)
    try:
        rj.prefill(params, config, spread + 2**20)
    except ValueError as error:
        assert "outside the vocabulary" in str(error)
    else:
        raise AssertionError("ids beyond the vocabulary were read")
print(rows_here, [(row["policy"], row["domain"], *row["each"]) for row in rows])
"""


def test_processes_share_the_windows_of_an_evaluation():
    """Each of two processes holds and decodes half of a batch, and both know all results: those of one process."""

    def said(environments):
        runs = [
            subprocess.Popen(
                [sys.executable, "-c", WINDOWS], env=environment() | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            for env in environments
        ]
        told = [run.communicate(timeout=300) for run in runs]
        assert [run.returncode for run in runs] == [0] * len(runs), told
        return [out.decode().splitlines()[-1].split(" ", 2) for out, _ in told]

    env = on_two_hosts()
    (alone,) = said([{}])
    first, second = said([env | {"JAX_PROCESS_ID": str(number)} for number in range(2)])
    assert alone[:2] == ["[4,", "4]"]
    assert first[:2] == second[:2] == ["[2,", "2]"]
    assert first[2] == second[2]
    numbers = [[float(value) for value in re.findall(r"\d+\.\d+", one[2])] for one in (alone, first)]
    assert len(numbers[0]) == 12
    assert numbers[0] == pytest.approx(numbers[1], abs=2e-4)


def test_all_hosts_learn_what_the_first_returns_or_raises():
    """So a bad line in results.jsonl, which only the first process reads, ends every process with one line."""
    env = environment() | on_two_hosts()
    command = [sys.executable, "-c", TELL]
    pipes = {"stdout": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen(command, env=env | {"JAX_PROCESS_ID": str(number)}, **pipes) for number in range(2)]
    said = [run.communicate(timeout=120)[0].splitlines()[-2:] for run in runs]
    assert said == [["hello", "seen by the first process only"]] * 2


def test_a_lone_address_is_an_error(run_module):
    ran = run_module("eval.ruler", env={"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1"})
    assert ran.returncode == 2
    assert "whole numbers in JAX_NUM_PROCESSES and JAX_PROCESS_ID go with it" in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1


def test_a_share_that_does_not_divide_is_an_error():
    config = LlamaConfig.tiny()
    with pytest.raises(ValueError, match="--mesh tensor=2 is not of the 1 devices"):
        backends.mesh("tensor=2", config, 4)
    with pytest.raises(ValueError, match="--mesh sequence=2 is not of the 1 devices"):
        backends.mesh("sequence=2", config, 4)
    for spec in ("tensor=two", "rows=2", "data=0", "data=1,data=1", ""):
        with pytest.raises(ValueError, match=f"--mesh {spec}: "):
            backends.mesh(spec, config, 4)
    assert backends.mesh("auto", config, 4) is None


@pytest.mark.parametrize(
    ("spec", "batch", "kv_heads", "memory", "want"),
    [
        ("auto", 8, 4, None, (4, 1, 1)),  # rows apart, which needs no communication
        ("auto", 2, 4, None, (2, 2, 1)),
        ("auto", 1, 4, None, (1, 4, 1)),
        ("auto", 3, 2, None, (1, 4, 1)),  # two devices share a key/value head
        ("auto", 8, 4, 0.6, (1, 4, 1)),  # of the weights' size: a quarter and as much again
        ("auto", 8, 4, 4.0, (4, 1, 1)),
        ("data=4", 1, 4, None, (4, 1, 1)),
        ("tensor=2", 8, 4, None, (2, 2, 1)),
        ("sequence=4", 1, 4, None, (1, 1, 4)),
        ("sequence=2", 1, 4, None, (1, 2, 2)),
        ("sequence=2,data=2", 8, 4, None, (2, 1, 2)),
    ],
)
def test_the_mesh_that_is_chosen(monkeypatch, spec, batch, kv_heads, memory, want):
    config = LlamaConfig.tiny(num_attention_heads=4, num_key_value_heads=kv_heads)
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    monkeypatch.setattr(sharding, "mesh", lambda data, fsdp, tensor, sequence, kv_heads: (data, tensor, sequence))
    if memory is not None:
        shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
        size = memory * 2 * sum(leaf.size for leaf in jax.tree.leaves(shapes))
        monkeypatch.setattr(
            jax, "local_devices", lambda: [types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": size})]
        )
    assert backends.mesh(spec, config, batch) == want
