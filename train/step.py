"""One training step: gradients of the mean token loss, an update unless they are not finite, and metrics."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from recyc_jax import sharding
from recyc_jax.cache import Leaf
from recyc_jax.config import LlamaConfig
from train import forward
from train.optimizer import Optimizer

Batch = dict[str, Array]  # "tokens" int32 [B, T]; for packed rows also "segments" int32 [B, T]


@flax.struct.dataclass
class TrainState:
    """Everything that training carries from step to step. `params` are stacked (`forward.stack_layers`), float32."""

    step: Leaf  # int32 []: batches taken
    params: Any
    optimizer: Any
    skipped: Leaf  # int32 []: updates skipped because the loss or gradients were not finite
    skipped_in_row: Leaf  # int32 []: skipped updates since the last one that was applied


def start(params: Any, optimizer: Optimizer) -> TrainState:
    """The state before the first step."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, optimizer.make().init(params), zero, zero)


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    config: LlamaConfig,
    optimizer: Optimizer,
    attention: forward.Attention,
    sliding_attention: forward.Attention | None = None,
    mesh: Mesh,
    accumulate: int,
    compute_dtype: Any,
    remat: forward.Remat,
    z_loss: float,
) -> tuple[TrainState, dict[str, Array]]:
    """The next state and the step's metrics: `loss` (nats per token, the mean over the batch), `grad_norm` (before
    clipping), `finite` (whether loss and gradients are) and `tokens` (how many have a loss).

    The batch is processed in `accumulate` parts; the gradient is that of the mean over the whole batch, however it is
    cut. If the loss or any gradient is not finite, parameters and optimizer state stay unchanged, and the skipped
    update is counted."""
    rows = batch["tokens"].shape[0]
    split = NamedSharding(mesh, PartitionSpec(None, sharding.ROWS))
    by_row = NamedSharding(mesh, PartitionSpec(sharding.ROWS))
    parts = jax.tree.map(
        lambda x: lax.with_sharding_constraint(x.reshape(accumulate, rows // accumulate, *x.shape[1:]), split), batch
    )

    def total_loss(params: Any, part: Batch) -> tuple[Array, Array]:
        """The summed loss of the tokens, and their number."""
        narrow = jax.tree.map(lambda leaf: leaf.astype(compute_dtype), params)
        segments = part.get("segments")
        losses = forward.token_losses(
            narrow,
            config,
            part["tokens"],
            segments,
            attention,
            sliding_attention=sliding_attention,
            remat=remat,
            z_loss=z_loss,
            shares=math.prod(mesh.shape[name] for name in sharding.ROWS),
            place=lambda x: lax.with_sharding_constraint(x, by_row),
            look_up=functools.partial(sharding.rows_of, mesh=mesh),
        )
        # the first token of a document is not predicted from the document before it
        counts = (
            jnp.ones_like(losses) if segments is None else (segments[:, 1:] == segments[:, :-1]).astype(jnp.float32)
        )
        return jnp.sum(losses * counts), jnp.sum(counts)

    def add(carry: tuple[Any, Array, Array], part: Batch) -> tuple[Any, None]:
        grads, loss, tokens = carry
        (part_loss, part_tokens), part_grads = jax.value_and_grad(total_loss, has_aux=True)(state.params, part)
        return (jax.tree.map(jnp.add, grads, part_grads), loss + part_loss, tokens + part_tokens), None

    nothing = jax.tree.map(jnp.zeros_like, state.params), jnp.zeros(()), jnp.zeros(())
    (grads, loss, tokens), _ = lax.scan(add, nothing, parts)
    share = 1 / jnp.maximum(tokens, 1)
    grads = jax.tree.map(lambda grad: grad * share, grads)
    norm = jnp.sqrt(sum(jnp.sum(grad**2) for grad in jax.tree.leaves(grads)))
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)

    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes; our code runs under strict promotion
        updates, new_optimizer = optimizer.make().update(grads, state.optimizer, state.params)
    made = (optax.apply_updates(state.params, updates), new_optimizer)
    params, kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), made, (state.params, state.optimizer))
    missed = (~finite).astype(jnp.int32)
    after = TrainState(state.step + 1, params, kept, state.skipped + missed, (state.skipped_in_row + 1) * missed)
    return after, {"loss": loss * share, "grad_norm": norm, "finite": finite, "tokens": tokens}


def attention_over(mesh: Mesh, attend: Callable[..., Array]) -> forward.Attention:
    """`attend` under `shard_map`: each device computes its own rows and heads."""
    heads = PartitionSpec(sharding.ROWS, None, "tensor", None)
    rows = PartitionSpec(sharding.ROWS, None)

    def attention(q: Array, k: Array, v: Array, segments: Array | None) -> Array:
        if segments is None:
            whole = jax.shard_map(
                lambda q, k, v: attend(q, k, v, None),
                mesh=mesh,
                in_specs=(heads,) * 3,
                out_specs=heads,
                check_vma=False,
            )
            return whole(q, k, v)
        packed = jax.shard_map(attend, mesh=mesh, in_specs=(*(heads,) * 3, rows), out_specs=heads, check_vma=False)
        return packed(q, k, v, segments)

    return attention
