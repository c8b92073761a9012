"""Peak memory of loading: a process holds its share of the weights and little more. Processes and devices are real ones
of a CPU, where the devices' memory is the process's own."""

import json
import socket
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from conftest import environment
from safetensors.numpy import save_file

import recyc_jax as rj
from recyc_jax.loading import weights

SHAPE = dict(
    model_type="qwen3",
    vocab_size=64000,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=6,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=4096,
    hidden_act="silu",
)
LOAD = """
import sys, threading, time
from pathlib import Path
from types import SimpleNamespace
import jax, numpy as np

folder, which, process, processes, port = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])
if processes > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)
from recyc_jax import sharding
from recyc_jax.loading import pretrained, weights
from train import optimizer, state

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) / 2**20

config, mesh = pretrained.read_config(folder), sharding.mesh(1, jax.device_count(), 1)
jax.numpy.zeros(1).block_until_ready()
begin = peak = resident()

def watch():
    global peak
    while True:
        peak = max(peak, resident())
        time.sleep(0.005)

threading.Thread(target=watch, daemon=True).start()
if which == "decoding":
    params = weights.load_params(folder, config, np.float32, mesh)
else:
    steps = optimizer.Optimizer(1e-4, "constant", 0, 1, 0.0, 1.0, "adafactor")
    params = state.load_state(SimpleNamespace(model=config, folder=folder, mesh=mesh, optimizer=steps)).params
jax.block_until_ready(params)
share = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards) / 2**30
print("GiB", share, peak - begin)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    (folder / "config.json").write_text(json.dumps(SHAPE))
    shapes = weights.stored_shapes(rj.LlamaConfig.from_hf(SHAPE))
    tensors = {name: np.full(shape, 0.5, ml_dtypes.bfloat16) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("which", ["decoding", "training"])
def test_a_process_holds_its_share(folder, which, processes):
    """Training's share is that of the parameters; its optimizer's state, and the copy that XLA makes, come on top."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = environment() | {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    commands = [
        [sys.executable, "-c", LOAD, folder, which, *map(str, (process, processes, port))]
        for process in range(processes)
    ]
    runs = [subprocess.Popen(list(map(str, one)), env=env, stdout=subprocess.PIPE, text=True) for one in commands]
    whole = sum(np.prod(shape) * 4 for shape in weights.stored_shapes(rj.LlamaConfig.from_hf(SHAPE)).values()) / 2**30
    for run in runs:
        said = run.communicate(timeout=300)[0]
        assert run.returncode == 0
        _, share, peak = said.strip().splitlines()[-1].split()
        print(
            f"{which}, {processes} processes: share {float(share):.2f} GiB, peak above the start {float(peak):.2f} GiB"
        )
        assert float(share) == pytest.approx(whole / processes, rel=0.01)
        assert float(peak) < float(share) + (0.4 if which == "decoding" else 2)
