"""`--dry-run`: the sizes of a run and the memory that it needs."""

from __future__ import annotations

import jax
import numpy as np

from recyc_jax import sharding
from train import state
from train.config import eval_lengths
from train.run import Run


def describe(run: Run) -> int:
    """Print a run's mesh, sizes and memory. Compiles the training step; allocates no arrays. Returns exit status 0."""
    abstract = state.abstract_state(run)
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(abstract.params))
    memory = state.compiled_step(run, abstract).memory_analysis()
    config, mesh = run.config, run.mesh
    per_step = config.batch_size * config.length
    device = mesh.devices.flat[0]
    lines = {
        "mesh": " x ".join(f"{name} {size}" for name, size in sharding.sizes(mesh).items())
        + f" on {mesh.size} x {device.device_kind}",
        "parameters": f"{count:,}",
        "recycle": "off" if run.recycle is None else f"{config.recycle}, {run.recycle}",
        "attention": run.attention,
        "rows": f"{len(run.rows):,} of {config.length} tokens" + (", packed" if run.card["data"]["packed"] else ""),
        "held out": "nothing"
        if run.held_out is None
        else f"{len(run.held_out.tokens)} windows of {' and '.join(map(str, eval_lengths(config)))} tokens",
        "steps": f"{run.optimizer.steps:,}, {per_step:,} tokens each",
    }
    if memory is not None:
        gib = 1 << 30
        lines["memory a device"] = (
            f"{memory.argument_size_in_bytes / gib:.2f} GiB state and batch, {memory.temp_size_in_bytes / gib:.2f} GiB "
            "while a step is computed"
        )
    for line in run.data:
        print(line)
    for name, value in lines.items():
        print(f"{name}: {value}")
    return 0
