"""H100s to compile for, without one, and what is compiled."""

import importlib.metadata

import jax
import jax.numpy as jnp
import pytest

import recyc_jax as rj
from recyc_jax.prefilling import read_prompts
from recyc_jax.shapes import SHAPES, shortened

# XLA's description of an H100 SXM, with the limits that code is generated for
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

STEPS = 41


def devices(count):
    """So many H100s of one host."""
    try:
        importlib.metadata.version("jax-cuda12-pjrt")
    except importlib.metadata.PackageNotFoundError:
        pytest.fail(
            "-m cuda_aot compiles for CUDA and needs jax-cuda12-plugin and jax-cuda12-pjrt; .ci/run has the commands"
        )
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=H100, topology=f"1x1x{count}"
    )
    return topology.devices


def shapes(name, layers, batch, length, policy):
    config = shortened(SHAPES[name], layers)
    params = jax.eval_shape(lambda: rj.init_params(config, jax.random.key(0), jnp.bfloat16))
    tokens = jax.ShapeDtypeStruct((batch, length - STEPS), jnp.int32)
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)

    def read(params, tokens, lengths):
        return read_prompts.__wrapped__(params, tokens, lengths, config, STEPS, policy.needs, "pallas_gpu")

    return config, params, (tokens, lengths), read, jax.eval_shape(read, params, tokens, lengths)
