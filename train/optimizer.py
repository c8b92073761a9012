"""The optimizer, its learning rate, and the sharding of its state."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from recyc_jax import sharding


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The optimizer's settings. Weight decay applies to matrices only, not to norms and biases."""

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
        """The learning rate by step: linear warm-up, then `schedule`; "linear" and "cosine" reach 0 at `steps`."""
        decay_steps = max(1, self.steps - self.warmup_steps)
        after = {
            "linear": lambda: optax.linear_schedule(self.learning_rate, 0.0, decay_steps),
            "cosine": lambda: optax.cosine_decay_schedule(self.learning_rate, decay_steps),
            "constant": lambda: optax.constant_schedule(self.learning_rate),
        }[self.schedule]()
        if self.warmup_steps == 0:
            return after
        warmup = optax.linear_schedule(0.0, self.learning_rate, self.warmup_steps)
        # the first update has the rate learning_rate / warmup_steps, not 0
        return optax.join_schedules([lambda step: warmup(step + 1), after], [self.warmup_steps])

    def make(self) -> optax.GradientTransformation:
        clip = optax.clip_by_global_norm(self.clip) if self.clip else optax.identity()
        if self.kind == "adafactor":  # its factored second moments take little memory
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


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for each leaf of a train state. Adam's moments are sharded like their parameters. Adafactor's
    factored moments, which are small, and its placeholders of one element are replicated."""

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        factored = any(getattr(key, "name", None) in ("v_row", "v_col") for key in path)
        spec = PartitionSpec() if factored or leaf.size == 1 else sharding.spec(path, leaf)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, tree)
