"""The train state of a run (shapes, shardings, values before the first step) and its compiled training step."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import recyc_jax as rj
from recyc_jax import sharding, training_implementations
from recyc_jax.loading import weights
from train import forward, optimizer, step
from train.run import Run


def abstract_state(run: Run) -> step.TrainState:
    """The shape, dtype and sharding of each leaf of the train state."""

    def initial() -> step.TrainState:
        params = rj.init_params(run.model, jax.random.key(0))
        return step.start(forward.stack_layers(params, run.model.num_hidden_layers), run.optimizer)

    shapes = jax.eval_shape(initial)
    places = optimizer.shardings(shapes, run.mesh)
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), shapes, places)


def abstract_batch(run: Run) -> dict[str, Any]:
    at = NamedSharding(run.mesh, PartitionSpec(sharding.ROWS))
    shape = (run.config.batch_size, run.config.length)
    return {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=at) for name in run.rows[0]}


def compiled_step(run: Run, state: Any) -> Any:
    """The training step, compiled for the shapes and shardings of `state`."""
    taken = functools.partial(
        step.train_step,
        config=run.model,
        optimizer=run.optimizer,
        attention=step.attention_over(run.mesh, training_implementations.attention(run.attention, run.recycle)),
        sliding_attention=step.attention_over(
            run.mesh, training_implementations.sliding(run.attention, run.model.sliding_window)
        ),
        mesh=run.mesh,
        accumulate=run.config.accumulate,
        compute_dtype=run.compute_dtype,
        remat=run.config.remat,
        z_loss=run.config.z_loss,
    )
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    jitted = jax.jit(taken, donate_argnums=0, out_shardings=(places, NamedSharding(run.mesh, PartitionSpec())))
    return jitted.lower(state, abstract_batch(run)).compile()


def load_state(run: Run) -> step.TrainState:
    """The train state before the first step, with the model's weights: each process reads the parts of its own devices
    straight from the files, so neither it nor a device has to hold all of them."""
    like = abstract_state(run)
    layers = run.model.num_hidden_layers
    read = weights.reader(run.folder, run.model, np.float32)

    def place(path: tuple[Any, ...], target: Any) -> jax.Array:
        keys = tuple(key.key for key in path)

        def part(index: tuple[slice, ...]) -> np.ndarray:
            if keys[0] != "layers":
                return read(keys, index)
            among = range(layers)[index[0]]
            return np.stack([read((f"layers_{layer}", *keys[1:]), index[1:]) for layer in among])

        return jax.make_array_from_callback(target.shape, target.sharding, part)

    placed = jax.tree_util.tree_map_with_path(place, like.params)
    places = jax.tree.map(lambda leaf: leaf.sharding, like)
    return jax.jit(lambda params: step.start(params, run.optimizer), donate_argnums=0, out_shardings=places)(placed)
