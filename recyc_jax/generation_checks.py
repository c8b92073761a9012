"""Checks of what `generate`, `decode`, `score` and streams are given, before anything is computed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Key

from recyc_jax import implementations, lossless
from recyc_jax.config import LlamaConfig
from recyc_jax.policies.base import Policy
from recyc_jax.policies.lossless import Lossless
from recyc_jax.prefilling import Prefilled
from recyc_jax.sampling import OfFunction, Sample, as_chain, independent
from recyc_jax.validation import whole_number


def check_state(state: Prefilled, policy: Policy, implementation: str | None) -> None:
    """Raise ValueError for a state that was donated, is stored in another implementation's layout, or lacks what the
    policy needs of the prompt."""
    if isinstance(state.logits, jax.Array) and not isinstance(state.logits, Tracer) and state.logits.is_deleted():
        raise ValueError("this state was donated to an earlier decode: use the state that it returned")
    if state.cache.layers[0].slots_last != implementations.resolve(implementation).slots_last:
        raise ValueError(
            f"implementation={implementation!r} stores its cache in another layout than this state's: prefill with it"
        )
    if not state.stats:  # every layer has a sliding window
        return
    if state.answer is not None and state.answer.policy != policy:
        raise ValueError(
            f"this answer was begun under {state.answer.policy}: go on under it, or `rewind(state)` to the prompts to"
            f" decode under {policy}"
        )
    needs, stats = policy.needs, state.stats[0]
    missing = {
        "scores": not needs.windows <= stats.scores.keys(),
        "last query": needs.query and stats.q is None,
        "accumulated attention": needs.mass and stats.mass is None,
        "spare slots": needs.spare > state.needs.spare,
    }
    for what in (name for name, lacks in missing.items() if lacks):
        raise ValueError(f"{policy} needs the prompt's {what}: name it in prefill(policies=...)")


def check_sampling(
    config: LlamaConfig,
    policy: Policy,
    sampling: Any,
    eos_ids: Any,
    pad_id: Any,
    key: Any,
    implementation: str | None,
) -> None:
    """Raise ValueError as `generate` does for these arguments, before prompts are read."""
    if isinstance(policy, Lossless):
        lossless.check(config, as_chain(sampling), implementations.resolve(implementation))
    sampling_arguments(config, sampling, eos_ids, pad_id, key, None)


def sampling_arguments(
    config: LlamaConfig, sampling: Any, eos_ids: Any, pad_id: Any, key: Any, batch: int | None
) -> tuple[Key[Array, " B"] | None, tuple[int, ...], int]:
    """The rows' keys, the end-of-sequence ids and the pad id. Raises ValueError naming the argument at fault. `batch`
    is None where it is not known yet: then no keys are made."""
    sampler = as_chain(sampling).sampler
    draws = isinstance(sampler, Sample) or (isinstance(sampler, OfFunction) and key is not None)
    keys = _row_keys(key, batch) if draws else None
    if eos_ids is None:
        eos_ids = config.eos_token_ids
    elif isinstance(eos_ids, np.ndarray | jax.Array):
        eos_ids = np.ravel(eos_ids)
    elif not isinstance(eos_ids, Iterable) or isinstance(eos_ids, str):
        eos_ids = (eos_ids,)
    ids = sorted({whole_number("eos_ids", token, 0) for token in eos_ids})
    return keys, tuple(ids), whole_number("pad_id", pad_id, 0)


def _row_keys(key: Any, batch: int | None) -> Key[Array, " B"] | None:
    """One PRNG key per row: those given, or folded from the one given."""
    if not isinstance(key, jax.Array):
        raise ValueError(f"sampling needs a key: pass key=jax.random.key(seed), not {key!r}")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        try:
            key = jax.random.wrap_key_data(key)
        except TypeError as error:
            raise ValueError(f"key holds no PRNG key: pass jax.random.key(seed) ({error})") from None
    key = independent(key)
    if batch is None:
        return None
    if key.shape not in ((), (batch,)):
        raise ValueError(f"key must be one key or one per row ({batch}), not {list(key.shape)}")
    if key.shape:
        return key
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
