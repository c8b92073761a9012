"""The training step of a plan as a compiled program, and the state that it begins with."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import recyc_jax as rj
from recyc_jax import pretrained, sharding
from recyc_jax.attention import training_api
from train import forward, step

if TYPE_CHECKING:
    from train.plan import Plan


def abstract_state(plan: Plan) -> step.TrainState:
    """The state's shapes and where each leaf lies."""

    def initial() -> step.TrainState:
        params = rj.init_params(plan.model, jax.random.key(0))
        return step.start(forward.stack_layers(params, plan.model.num_hidden_layers), plan.optimizer)

    shapes = jax.eval_shape(initial)
    places = sharding.shardings(shapes, plan.mesh)
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), shapes, places)


def abstract_batch(plan: Plan) -> dict[str, Any]:
    at = NamedSharding(plan.mesh, PartitionSpec(sharding.ROWS))
    shape = (plan.config.batch_size, plan.config.length)
    return {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=at) for name in plan.rows[0]}


def compiled_step(plan: Plan, state: Any) -> Any:
    """The training step, compiled for these shapes and places."""
    taken = functools.partial(
        step.train_step,
        config=plan.model,
        optimizer=plan.optimizer,
        attention=step.attention_over(plan.mesh, training_api.attention(plan.attention, plan.recycle)),
        mesh=plan.mesh,
        accumulate=plan.config.accumulate,
        compute_dtype=plan.compute_dtype,
        remat=plan.config.remat,
        z_loss=plan.config.z_loss,
    )
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    jitted = jax.jit(taken, donate_argnums=0, out_shardings=(places, NamedSharding(plan.mesh, PartitionSpec())))
    return jitted.lower(state, abstract_batch(plan)).compile()


def load_state(plan: Plan) -> step.TrainState:
    """The state before the first step, from the model's weights; read on the host, then placed."""
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names accelerators alone
        host = None
    with jax.default_device(host):
        params = pretrained.load_params(plan.folder, plan.model, jnp.float32)
        stacked = jax.tree.map(np.asarray, forward.stack_layers(params, plan.model.num_hidden_layers))
    like = abstract_state(plan)

    def place(leaf: np.ndarray, target: Any) -> jax.Array:
        return jax.make_array_from_callback(leaf.shape, target.sharding, lambda index: leaf[index])

    placed = jax.tree.map(place, stacked, like.params)
    places = jax.tree.map(lambda leaf: leaf.sharding, like)
    return jax.jit(lambda params: step.start(params, plan.optimizer), donate_argnums=0, out_shardings=places)(placed)
