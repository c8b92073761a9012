"""What a partial step reads between refreshes: which tokens leave, and when."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import recyc_jax as rj
from recyc_jax.attention.implementation import Implementation
from recyc_jax.attention.kept import KeptSlots
from recyc_jax.cache import LayerCache
from recyc_jax.policies.base import Step
from recyc_jax.policies.recycled_parts import RecycledState

FIRST_NEW = 100


def read(kept, reads):
    """The slots that a step reads, in ascending order."""
    left, first = reads.remaining(kept.size)
    slots = np.asarray(kept.slots)[0, 0, : max(0, int(left[0]))]
    newest = range(int(first[0]), int(reads.length))
    assert len(newest) <= reads.most
    return sorted([*slots[slots >= 0].tolist(), *newest])


@given(
    ranked=st.lists(st.integers(0, 99), min_size=0, max_size=12, unique=True),
    empty=st.integers(0, 5),
    steps=st.integers(1, 30),
    evict=st.booleans(),
)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_empty_then_lowest_ranked_then_oldest_new(ranked, empty, steps, evict):
    if not ranked and not empty:
        return
    size = len(ranked) + empty
    policy = rj.RecycledAttention(size, rj.FixedStride(steps + 1), evict=evict)
    kept = KeptSlots(jnp.asarray([[[*ranked, *[-1] * empty]]], jnp.int32))
    state = RecycledState(kept, jnp.full(1, FIRST_NEW, jnp.int32), None, None)
    cached = LayerCache(*[jnp.zeros((1, 1, 200, 2))] * 2)
    q, none = jnp.zeros((1, 1, 2)), jnp.zeros(1, jnp.int32)
    left, new = list(ranked), []
    for number in range(1, steps + 1):
        new.append(FIRST_NEW + number - 1)
        if evict and len(left) + len(new) > size:
            (left.pop() if left else new.pop(0))
        step = Step(q, q, cached, none, jnp.int32(FIRST_NEW + number), jnp.int32(number), none > 0)
        assert read(*policy.reads(Implementation(), step, state)) == sorted(left + new)
