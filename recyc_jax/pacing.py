"""When lossless decoding (`lossless.py`) drafts, and how far: by what drafts and passes cost, and by what they gave lately.

A draft ends where another token would give less per time than those before it and the pass do. Drafts are made at all if
the batch's slowest row is done sooner with them, by each row's gain so far."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recyc_jax import sharding
from recyc_jax.attention.implementation import Implementation
from recyc_jax.cache import Leaf
from recyc_jax.config import LlamaConfig
from recyc_jax.model import Params
from recyc_jax.policies.lossless import Lossless

MEMORY = 0.9
"""What a round of drafts keeps of what was known of the rounds before it."""
FIRST = 1.5
"""The gain (`Pace`) that an answer begins with."""
PROBE = 16
"""Steps without drafts after which drafts are tried; twice as many after each trial."""
TRIAL = 1.1
"""The gain that such a trial begins with: few bad rounds end it."""
LIKELY = 0.95
"""The share of drafts that can be hoped to be kept. Where not even that would pay, none are made."""
RUN = 4
"""Full steps that are taken at a time where drafts do not pay: a decision after each would keep a GPU waiting."""
PASS_COST = 1.25
"""What a pass over a block costs, in full steps: on an H100 1.2 to 1.3 (docs/results/lossless.md)."""
OVERHEAD = 2**27
"""Bytes that could be read in the time that a layer takes beside reading: 33 us on an H200, as measured for 8B and 0.5B
shapes (docs/results/lossless.md)."""
BEYOND_KERNELS = 1.5
"""That time in a pass over more tokens than the kernels of few rows take: so much more."""
STEPS, REFRESH, DRAFTS = range(3)
"""The kinds of a round."""


@flax.struct.dataclass
class Pace:
    """By what the next round is chosen."""

    gain: Leaf  # float32 [B]: in the rounds with drafts lately, tokens of a row per time of a full step
    rate: Leaf  # float32 []: the share of their drafts that were kept where the ones before them were
    waited: Leaf  # int32 []: steps since the last draft
    patience: Leaf  # int32 []: such steps before drafts are tried
    stale: Leaf  # bool []: the kept sets are not of the last round


def begin(rows: int) -> Pace:
    """The pace before an answer."""
    gain, rate = jnp.full(rows, FIRST, jnp.float32), jnp.asarray(LIKELY, jnp.float32)
    return Pace(gain, rate, jnp.zeros((), jnp.int32), jnp.asarray(PROBE, jnp.int32), jnp.zeros((), jnp.bool_))


class Costs(NamedTuple):
    """What a draft step and a pass over drafts cost, in full steps."""

    draft: Float[Array, ""]
    verify: Float[Array, ""]

    def round(self, count: Array) -> Array:
        """The cost of so many drafts and the pass over them."""
        return self.verify + self.draft * count.astype(jnp.float32)

    def is_worth_another(self, count: Array, gives: Array, next_gives: Array) -> Array:
        """Whether a draft that is expected to give `next_gives` tokens makes a round faster that has `count` drafts and
        gives `gives` tokens."""
        return next_gives * self.round(count) > self.draft * gives


class Pacing:
    """What the choices share that does not change in the loop."""

    def __init__(
        self, params: Params, config: LlamaConfig, attention: Implementation, policy: Lossless, starts: Int[Array, " B"]
    ) -> None:
        self.params, self.config, self.attention, self.policy, self.starts = params, config, attention, policy, starts

    @property
    def run(self) -> int:
        """Full steps at a time."""
        return min(RUN, self.policy.draft_length + 1)

    @property
    def widths(self) -> tuple[int, ...]:
        """The drafts that a pass has room for: it takes the least that its drafts need."""
        return tuple(sorted({max(1, self.policy.draft_length // 2), self.policy.draft_length}))

    def next_kind(self, pace: Pace, ends: Int[Array, " B"], left: Int[Array, " B"]) -> tuple[Array, Pace]:
        """The kind of the next round, and the pace with what it will have waited; `left` are the tokens that rows need."""
        can_pay, needed = self.can_pay(ends), left.astype(jnp.float32)
        # the batch takes as long as its slowest row
        pays = can_pay & (jnp.max(needed / pace.gain) < jnp.max(needed))
        tries = can_pay & ~pays & (pace.waited >= pace.patience)
        drafts = pays | tries
        kind = jnp.where(drafts, jnp.where(pace.stale, REFRESH, DRAFTS), STEPS)
        kind = jnp.where((kind == STEPS) & (jnp.max(left) < self.run), REFRESH, kind)
        waited = pace.waited + jnp.where(kind == STEPS, self.run, 1)
        waited = jnp.where(drafts, jnp.where(kind == DRAFTS, 0, pace.waited), waited)
        begins = tries & (kind == DRAFTS)
        gain = jnp.where(begins, jnp.maximum(pace.gain, TRIAL), pace.gain)
        patience = jnp.where(begins, 2 * pace.patience, pace.patience)
        return kind.astype(jnp.int32), Pace(gain, pace.rate, waited, patience, kind == STEPS)

    def after(
        self,
        pace: Pace,
        ends: Int[Array, " B"],
        count: Int[Array, ""],
        goes_on: Bool[Array, " B"],
        tokens: Int[Array, " B"],
        kept: Int[Array, " B"],
    ) -> Pace:
        """The pace after a round of `count` drafts which gave rows these tokens, drafts that were kept among them; by the
        rows that go on, since others got no more than they needed. `ends` are those before the round."""
        gain = tokens.astype(jnp.float32) / self.costs(ends).round(count)
        gain = jnp.where(goes_on, MEMORY * pace.gain + (1 - MEMORY) * gain, pace.gain)
        tried = jnp.sum(jnp.where(goes_on, jnp.minimum(kept + 1, count), 0))
        share = jnp.sum(jnp.where(goes_on, kept, 0)).astype(jnp.float32) / jnp.maximum(tried, 1).astype(jnp.float32)
        rate = jnp.where(tried > 0, MEMORY * pace.rate + (1 - MEMORY) * share, pace.rate)
        return dataclasses.replace(pace, gain=gain.astype(jnp.float32), rate=rate.astype(jnp.float32))

    def can_pay(self, ends: Int[Array, " B"]) -> Array:
        """Whether drafts of any length gain time if the share `LIKELY` of them is kept."""
        count = jnp.arange(1, self.policy.draft_length + 1, dtype=jnp.float32)
        tokens = (1 - LIKELY ** (count + 1)) / (1 - LIKELY)
        return jnp.any(tokens > self.costs(ends).round(count))

    def costs(self, ends: Int[Array, " B"]) -> Costs:
        """By the bytes that drafts, passes and full steps read on one device of the mesh that is set, and what layers take
        beside that."""
        c, rows, dtype = self.config, self.starts.shape[0], self.params["embedding"].dtype
        split = sharding.split_of(rows)
        weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.params)) / split.tensor
        token = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * dtype.itemsize
        # rows and slots are shared evenly, key/value heads by the devices that do not share one
        token = token * split.rows / rows / (split.tensor // split.group * sharding.slot_shares())
        held = (ends - self.starts).astype(jnp.float32)
        few = jnp.sum(jnp.minimum(held, self.policy.budget))
        beside = float(c.num_hidden_layers * OVERHEAD)  # more than 32 bits hold
        full = weights + beside + token * jnp.sum(held)
        layers, width = self.attention.decoder_layers, self.policy.draft_length + 1
        falls_back = layers(c, rows, dtype) is not None and layers(c, rows, dtype, width) is None
        more: Any = BEYOND_KERNELS * beside / full if falls_back else 0.0
        return Costs((weights + beside + token * few) / full, PASS_COST + more)
