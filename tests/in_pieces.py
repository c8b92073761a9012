"""The plain implementation with the data layout of the TPU's: slots last in memory, and kept sets as copies."""

from recyc_jax.attention.implementation import Implementation
from recyc_jax.kernels.tpu.copied_set import copy_first_slots, keep_copies


def compact(keys, values, chosen, most):
    """`compaction.compact` in plain JAX, with a gather."""
    import jax.numpy as jnp

    chosen_first = jnp.argsort(~chosen, axis=2, stable=True)[..., :most]
    is_chosen = (jnp.arange(most) < jnp.sum(chosen, axis=2, keepdims=True))[..., None]
    return tuple(
        jnp.where(is_chosen, jnp.take_along_axis(one, chosen_first[..., None], axis=2), 0) for one in (keys, values)
    )


class InPieces(Implementation):
    slots_last = True

    def keep(self, layers, scores, budget, ordered):
        return keep_copies(layers, scores, budget, compact)

    def first_slots(self, cached, starts, count):
        return copy_first_slots(cached, starts, count)
