"""Checks for policies of one's own."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recyc_jax.config import LlamaConfig
from recyc_jax.generation import decode, generate
from recyc_jax.model import init_params
from recyc_jax.policies.base import Policy
from recyc_jax.policies.full import FullAttention
from recyc_jax.prefilling import prefill
from recyc_jax.scoring import score_after

NEW = 12
LENGTHS = (3, 17, 40)


def check_policy(policy: Any, whole_within_budget: bool = True) -> None:
    """Run the policy on random prompts of a tiny random model (two layers, float32). Raises AssertionError, with a sentence
    that says which, where it breaks a law of all policies:

    - a row's tokens do not depend on the batch's other rows, nor on how much room there is
    - an answer in two calls is that of one, and no row has more full steps than steps
    - `score` follows the steps that `generate` takes
    - with a `budget`, prompts that with their answer are within it are read in full (if `whole_within_budget`)

    Errors of JAX, such as a state whose shapes change from step to step, come as they are."""
    _law(
        isinstance(policy, Policy) and hash(policy) == hash(policy),
        f"{policy!r} is no hashable Policy: a frozen dataclass",
    )
    with jax.default_matmul_precision("highest"):
        _check(policy, whole_within_budget)


def _law(holds: Any, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)


def _check(policy: Policy, whole_within_budget: bool) -> None:
    config = LlamaConfig.tiny(num_hidden_layers=2)
    # larger weights than usual, so that it matters what is attended to
    params = jax.tree.map(lambda leaf: 4 * leaf, init_params(config, jax.random.key(0)))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, config.vocab_size, length).tolist() for length in LENGTHS]
    made = functools.partial(generate, params, config, policy=policy, max_new_tokens=NEW, eos_ids=())
    together = made(prompts)
    longest = max(LENGTHS)
    for row, prompt in enumerate(prompts):  # in a batch of the same shape, beside copies of itself
        padded = np.asarray([prompt + [0] * (longest - len(prompt))] * len(prompts), np.int32)
        alone = made(padded, prompt_lengths=[len(prompt)] * len(prompts))
        same = np.array_equal(alone.tokens[0], together.tokens[row])
        _law(same, f"{policy}: the tokens of a row of {len(prompt)} depend on the other rows of its batch")
    _law(np.all(together.full_steps <= NEW - 1), f"{policy}: there are more full steps than steps")
    room = generate(params, config, prompts, policy=policy, max_new_tokens=NEW + 64, eos_ids=())
    _law(np.array_equal(room.tokens[:, :NEW], together.tokens), f"{policy}: tokens depend on the room for later ones")

    state = prefill(params, config, prompts, policies=policy, max_new_tokens=NEW)
    first, state = decode(params, config, state, policy=policy, max_new_tokens=5, rewind=False, eos_ids=())
    second, state = decode(params, config, state, policy=policy, max_new_tokens=NEW - 5, rewind=False, eos_ids=())
    parts = np.concatenate([first.tokens, second.tokens], axis=1)
    _law(np.array_equal(parts, together.tokens), f"{policy}: an answer in two calls is not that of one")

    state = prefill(params, config, prompts, policies=policy, max_new_tokens=NEW)
    scores, _ = score_after(params, config, state, together.tokens, policy=policy)
    _law(jnp.all(scores.most_likely), f"{policy}: score takes other steps than generate")

    budget = getattr(policy, "budget", None)
    if whole_within_budget and budget is not None and budget >= 4:
        short, new = [prompt[: budget // 2] for prompt in prompts], max(1, budget - budget // 2)
        options: dict[str, Any] = dict(max_new_tokens=new, eos_ids=())
        whole, ours = (generate(params, config, short, policy=one, **options) for one in (FullAttention(), policy))
        same = np.array_equal(whole.tokens, ours.tokens)
        _law(same, f"{policy}: {budget} tokens are within its budget, and not all of them are read")
