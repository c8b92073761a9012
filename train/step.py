"""One training step: gradients of the mean token loss, a guarded update, what is reported of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

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

Batch = dict[str, Array]  # "tokens" int32 [B, T], and "segments" int32 [B, T] where rows are packed


@flax.struct.dataclass
class TrainState:
    """All that training carries from step to step. `params` are stacked (`forward.stack_layers`), float32."""

    step: Leaf  # int32 []: batches taken
    params: Any
    optimizer: Any
    skipped: Leaf  # int32 []: updates left out because of numbers that are not finite
    skipped_in_row: Leaf  # int32 []: the latest of them without one that was made in between


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The optimizer's settings. Weight decay is left to matrices: norms and biases have none."""

    learning_rate: float
    schedule: Literal["linear", "cosine", "constant"]
    warmup_steps: int
    steps: int
    weight_decay: float
    clip: float
    kind: Literal["adamw", "adafactor"]
    b1: float = 0.9
    b2: float = 0.999
    moment_dtype: Literal["float32", "bfloat16"] = "float32"

    def rate(self) -> optax.Schedule:
        """The learning rate by step: up from 0 in a line, then as `schedule` says, 0 at `steps`."""
        falling = max(1, self.steps - self.warmup_steps)
        after = {
            "linear": lambda: optax.linear_schedule(self.learning_rate, 0.0, falling),
            "cosine": lambda: optax.cosine_decay_schedule(self.learning_rate, falling),
            "constant": lambda: optax.constant_schedule(self.learning_rate),
        }[self.schedule]()
        if self.warmup_steps == 0:
            return after
        warmup = optax.linear_schedule(0.0, self.learning_rate, self.warmup_steps)
        # the first update is made at the rate of 1 / warmup, not of 0
        return optax.join_schedules([lambda step: warmup(step + 1), after], [self.warmup_steps])

    def make(self) -> optax.GradientTransformation:
        clip = optax.clip_by_global_norm(self.clip) if self.clip else optax.identity()
        if self.kind == "adafactor":  # its second moments are factored: little state
            return optax.chain(clip, optax.adafactor(self.rate()))
        adamw = optax.adamw(
            self.rate(),
            self.b1,
            self.b2,
            weight_decay=self.weight_decay,
            mask=_decayed,
            mu_dtype=jnp.dtype(self.moment_dtype),
        )
        return optax.chain(clip, adamw)


def _decayed(params: Any) -> Any:
    def is_matrix(path: tuple[Any, ...], leaf: Any) -> bool:
        return path[-1].key in ("kernel", "embedding", "head")

    return jax.tree_util.tree_map_with_path(is_matrix, params)


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
    mesh: Mesh,
    accumulate: int,
    compute_dtype: Any,
    remat: forward.Remat,
    z_loss: float,
) -> tuple[TrainState, dict[str, Array]]:
    """The next state, and the step's numbers: `loss` (nats a token, over all of the batch's tokens), `grad_norm` before
    clipping, `finite`, `tokens` that had a loss.

    The batch is worked on in `accumulate` parts; the gradient is that of the whole batch's mean, however it is cut. Where
    the loss or any gradient is not finite, parameters and optimizer stay as they are, and that is counted.
    """
    rows = batch["tokens"].shape[0]
    split = NamedSharding(mesh, PartitionSpec(None, sharding.ROWS))
    by_row = NamedSharding(mesh, PartitionSpec(sharding.ROWS))
    parts = jax.tree.map(
        lambda x: lax.with_sharding_constraint(x.reshape(accumulate, rows // accumulate, *x.shape[1:]), split), batch
    )

    def total_loss(params: Any, part: Batch) -> tuple[Array, Array]:
        """The sum over tokens, and their number."""
        narrow = jax.tree.map(lambda leaf: leaf.astype(compute_dtype), params)
        segments = part.get("segments")
        losses = forward.token_losses(
            narrow,
            config,
            part["tokens"],
            segments,
            attention,
            remat=remat,
            z_loss=z_loss,
            shares=math.prod(mesh.shape[name] for name in sharding.ROWS),
            place=lambda x: lax.with_sharding_constraint(x, by_row),
        )
        # across a border between documents nothing is predicted
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

    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes; everything of ours runs under strict promotion
        updates, new_optimizer = optimizer.make().update(grads, state.optimizer, state.params)
    made = (optax.apply_updates(state.params, updates), new_optimizer)
    params, kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), made, (state.params, state.optimizer))
    missed = (~finite).astype(jnp.int32)
    after = TrainState(state.step + 1, params, kept, state.skipped + missed, (state.skipped_in_row + 1) * missed)
    return after, {"loss": loss * share, "grad_norm": norm, "finite": finite, "tokens": tokens}


def attention_over(mesh: Mesh, attend: Callable[..., Array]) -> forward.Attention:
    """`attend` with each device at work on its own rows and heads."""
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
