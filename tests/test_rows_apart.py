"""In batches of one shape a row is the same bit for bit, whatever its neighbours are: under every policy, in bfloat16 as in
float32. In a batch of another shape it is the same but for rounding, since matrix products then sum in another order. In
bfloat16 its tokens soon show that."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from policy_strings import STRINGS, WIDTH

import recyc_jax as rj
from recyc_jax import prefilling

LAYERS = 1
LENGTH, NEW, ROW = 9, 9, 1
NEIGHBOURS = ([36, 20], [3, 9], [1, 36], [9, 1], [12, 13])
"""Their lengths. Beside long ones prefill computes chunks that it skips beside short ones."""
EACH_METHOD = (0, 1, 7, 10, 12, 14)
"""Of the strings, one per method and kind of schedule; the others are slow tests."""


@pytest.fixture(scope="module", autouse=True)
def several_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefilling, "PREFILL_CHUNK", WIDTH // 3)
        yield


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "text", [pytest.param(text, marks=[pytest.mark.slow] * (n not in EACH_METHOD)) for n, text in enumerate(STRINGS)]
)
def test_a_row_is_the_same_bits_beside_any_neighbours(params, config, text, dtype):
    """Log-probabilities of given tokens come from the loop that makes tokens, and show what tokens may hide."""
    policy, params = rj.parse_policy(text), jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    draw = np.random.default_rng(0)
    mine = draw.integers(0, config.vocab_size, WIDTH + NEW)
    row, others = set(), set()
    for before, after in NEIGHBOURS:
        tokens = draw.integers(0, config.vocab_size, (3, WIDTH + NEW))
        tokens[ROW] = mine
        prompts, lengths = tokens[:, :WIDTH], [before, LENGTH, after]
        state = rj.prefill(params, config, prompts, policies=STRINGS, max_new_tokens=NEW, prompt_lengths=lengths)
        scores, state = rj.score_after(params, config, state, tokens[:, WIDTH:], policy=policy)
        shown = (state.logits, scores.log_probabilities, scores.full_steps, *jax.tree.leaves(scores.states))
        shown = [np.asarray(one) for one in shown]
        row.add(b"".join(one[ROW].tobytes() for one in shown if one.ndim))
        others.add(shown[1][:ROW].tobytes())
    assert len(row) == 1
    assert len(others) == len(NEIGHBOURS)
