"""The contract that every policy must fulfil: the same tests for all registered methods."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_shapes import GEMMA_3, windows
from policy_strings import NEW, RAGGED, STRINGS, WIDTH, every_policy, same

import recyc_jax as rj
from recyc_jax.policies.base import PromptNeeds
from recyc_jax.policies.registry import POLICIES

FAMILIES = {  # of one layer for Llama, because policies treat layers alike
    "llama": dict(num_hidden_layers=1),
    "qwen3": dict(num_hidden_layers=1, qk_norm="head"),
    "gemma3": GEMMA_3 | windows(6, "sf"),
    "smollm3": dict(layers_without_rope=(1,)),
}
MARKED = [pytest.param(name, marks=[] if name == "llama" else pytest.mark.slow) for name in FAMILIES]


@pytest.fixture(scope="module", params=MARKED)
def config(request):
    return rj.LlamaConfig.tiny(**FAMILIES[request.param])


@pytest.fixture(scope="module")
def full(params, config):
    return rj.generate(params, config, RAGGED, max_new_tokens=NEW)


@pytest.fixture
def generate(params, config):
    return functools.partial(rj.generate, params, config, max_new_tokens=NEW)


def test_every_registered_method_is_here():
    assert {text.partition(":")[0] for text in STRINGS} == set(POLICIES)


@every_policy
def test_a_ragged_batch_is_each_row_alone(generate, full, policy):
    """The neighbours are the prompt itself, so that batches of one size are compared; and, for one policy, no rows."""
    together = generate(RAGGED, policy=policy)
    for row, prompt in enumerate(RAGGED):
        for batch in (4, 1) if policy == rj.parse_policy(STRINGS[7]) else (4,):
            padded = np.array([prompt + [7] * (WIDTH - len(prompt))] * batch)
            alone = generate(padded, prompt_lengths=[len(prompt)] * batch, policy=policy)
            same([field[row] for field in together], [field[0] for field in alone])
    if not isinstance(policy, rj.FullAttention):
        assert (np.asarray(together.tokens) != np.asarray(full.tokens)).any()  # the policy makes a difference


@every_policy
def test_a_budget_of_the_whole_length_is_full_attention(generate, full, policy):
    """Budgets of the longest row's 52 tokens (H2O: twice that, as half is for the latest), and far beyond the cache."""
    if isinstance(policy, rj.FullAttention):
        return
    whole = 52 * (1 + isinstance(policy, rj.H2O))
    for budget in (whole, 1000) if policy in (rj.parse_policy(STRINGS[1]), rj.parse_policy(STRINGS[12])) else (whole,):
        got = generate(RAGGED, policy=dataclasses.replace(policy, budget=budget))
        np.testing.assert_array_equal(got.tokens, full.tokens)


@pytest.mark.parametrize("text", ["full", *STRINGS[6::3]])
def test_arrays_inside_jit(params, config, generate, text):
    policy = rj.parse_policy(text)
    tokens, lengths = np.full((4, 50), 95, np.int32), np.array([len(prompt) for prompt in RAGGED], np.int32)
    for row, prompt in enumerate(RAGGED):
        tokens[row, : len(prompt)] = prompt

    @jax.jit
    def inside(tokens, lengths):
        return rj.generate(params, config, tokens, prompt_lengths=lengths, policy=policy, max_new_tokens=NEW)

    same(generate(RAGGED, policy=policy), inside(jnp.asarray(tokens), jnp.asarray(lengths)))


def test_one_prefill_serves_all(params, config, generate):
    """Policies that decode one after the other from one state give the same tokens as each alone."""
    policies = [rj.parse_policy(text) for text in ("full", *STRINGS[6::3], STRINGS[6])]
    state = rj.prefill(params, config, RAGGED, policies=policies, max_new_tokens=NEW)
    for policy in policies:
        out, state = rj.decode(params, config, state, policy=policy)
        same(out, generate(RAGGED, policy=policy))


@every_policy
def test_rows_end_and_steps_are_counted(generate, policy):
    """Ending a row changes no token before its end, in any row; only full steps before the end are counted."""
    plain = generate(RAGGED, policy=policy, eos_ids=())
    tokens = np.asarray(plain.tokens)
    eos = (int(tokens[0, 6]), int(tokens[1, 11]))
    out = generate(RAGGED, policy=policy, eos_ids=eos, pad_id=77)
    for row in range(4):
        ends = np.flatnonzero(np.isin(tokens[row], eos))
        length = ends[0] + 1 if ends.size else NEW
        assert int(out.lengths[row]) == length
        np.testing.assert_array_equal(out.tokens[row], np.append(tokens[row, :length], [77] * (NEW - length)))
        assert (np.asarray(out.full_steps[row]) <= np.asarray(plain.full_steps[row])).all()


@every_policy
def test_score_is_generate_teacher_forced(params, config, policy):
    prompts = np.arange(4 * WIDTH).reshape(4, WIDTH) % config.vocab_size
    out = rj.generate(params, config, prompts, policy=policy, max_new_tokens=NEW, eos_ids=())
    tokens = np.concatenate([prompts, out.tokens], axis=1)
    got = np.asarray(rj.score(params, config, tokens, policy=policy, context_length=WIDTH))
    assert got.shape == (4, NEW)
    assert (got > np.log(1 / config.vocab_size)).all()  # each is the likeliest of 96 tokens


@every_policy
def test_prefill_without_it_is_refused(params, config, policy):
    state = rj.prefill(params, config, RAGGED, max_new_tokens=NEW)
    if policy.needs == PromptNeeds():
        rj.decode(params, config, state, policy=policy)
    else:
        with pytest.raises(ValueError, match=r"needs the prompt's .*: name it in prefill\(policies=...\)"):
            rj.decode(params, config, state, policy=policy)
