"""The recycled set between refreshes: who leaves and when."""

import jax.numpy as jnp
from hypothesis import given, settings
from hypothesis import strategies as st

from recyc_jax.policies.recycled_set import Recycled


@given(
    ranked=st.lists(st.integers(0, 99), min_size=0, max_size=12, unique=True),
    empty=st.integers(0, 5),
    steps=st.integers(0, 30),
)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_empty_then_lowest_ranked_then_oldest_new(ranked, empty, steps):
    if not ranked and not empty:
        return
    recycled = Recycled.of(jnp.asarray([[[*ranked, *[-1] * empty]]], jnp.int32))
    kept, new = list(ranked), []
    for step in range(steps):
        slot = 100 + step
        recycled = recycled.insert(jnp.int32(slot))
        new.append(slot)
        if len(kept) + len(new) > len(ranked) + empty:
            (kept.pop() if kept else new.pop(0))
        present = sorted(at for at in recycled.slots[0, 0].tolist() if at >= 0)
        assert present == sorted(kept + new)
