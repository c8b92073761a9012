"""What a decode step must read and compute, and the least time that takes on a device: arithmetic, nothing is run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from recyc_jax.config import LlamaConfig
from recyc_jax.policies.base import Policy
from recyc_jax.policies.full import FullAttention
from recyc_jax.policies.h2o import H2O
from recyc_jax.policies.recycled import RecycledAttention
from recyc_jax.policies.snapkv import SnapKV
from recyc_jax.policies.streaming_llm import StreamingLLM

TILE = 128  # slots that a TPU reads at once where slots come last


@dataclasses.dataclass(frozen=True)
class Device:
    """One chip. Peaks are the vendor's, dense bfloat16."""

    name: str
    tera_operations: float  # per second
    gigabytes_per_second: float
    gigabytes: float
    reached: float  # the share of the bandwidth that a copy was seen to reach; 1 where nothing was measured
    copies: bool = False  # recycled sets are copied there (attention/pallas_tpu.py)


DEVICES = {
    device.name: device
    for device in (
        Device("v5e", 197, 819, 16, 1.0, copies=True),
        Device("v5p", 459, 2765, 95, 1.0, copies=True),
        Device("v6e", 918, 1640, 32, 1.0, copies=True),
        Device("h100", 989, 3350, 80, 2900 / 3350),  # SXM; a device copy moved 2.82 to 2.90 TB/s
        Device("h200", 989, 4800, 141, 1.0),
    )
}


@dataclasses.dataclass(frozen=True)
class Step:
    """One kind of decode step, for the whole batch."""

    bytes: int
    operations: int

    def milliseconds(self, device: Device, chips: int = 1) -> float:
        """The longer of reading and computing, spread evenly over the chips; what they tell each other is not counted."""
        reading = self.bytes / (device.gigabytes_per_second * device.reached * 1e9)
        return 1000 * max(reading, self.operations / (device.tera_operations * 1e12)) / chips


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A policy's steps. A policy without full steps, or without partial ones, has None there."""

    policy: Policy
    full: Step | None  # refreshing where the policy does
    partial: Step | None
    period: int  # steps of which the last is full

    def milliseconds(self, device: Device, chips: int = 1) -> float:
        """The mean step. A dynamic schedule counts as if every check led to a full step: the most it can cost."""
        full, partial = (step.milliseconds(device, chips) if step else 0.0 for step in (self.full, self.partial))
        if self.full is None or self.partial is None:
            return full + partial
        return (full + (self.period - 1) * partial) / self.period


def weight_bytes(config: LlamaConfig, size: int = 2) -> tuple[int, int]:
    """(all weights, those that a step reads), `size` bytes a number: of an embedding that is no head it reads rows."""
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    projections = config.hidden_size * dim * (2 * heads + 2 * kv_heads)
    biases = dim * (heads + 2 * kv_heads) if config.qkv_bias else 0
    layer = projections + biases + 3 * config.hidden_size * config.intermediate_size + 2 * config.hidden_size
    table = config.vocab_size * config.hidden_size
    read = config.num_hidden_layers * layer + config.hidden_size + table
    return size * (read + (0 if config.tie_word_embeddings else table)), size * read


def token_bytes(config: LlamaConfig, size: int = 2) -> int:
    """Keys and values of one token in all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * size


def estimate(
    config: LlamaConfig, policy: Policy, batch: int, length: int, copies: bool = False, size: int = 2
) -> Estimate:
    """What a policy's steps read at a context of `length` tokens. `copies`: as on TPU, where a refresh reads the cache once
    more and writes the set, and a partial step reads whole tiles."""

    def step(read: float, scored: float) -> Step:
        """`read` tokens of keys and values pass between memory and chip, `scored` are attended to, a row."""
        moved = batch * read * token_bytes(config, size)
        products = 4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers * scored
        weights = weight_bytes(config, size)[1]
        return Step(int(weights + moved), int(batch * (2 * weights / size + products)))

    whole = step(length, length)
    if isinstance(policy, FullAttention):
        return Estimate(policy, whole, None, 1)
    budget = min(policy.budget, length)  # type: ignore[attr-defined]
    if isinstance(policy, RecycledAttention):
        newest = -(-policy.period // TILE) * TILE + TILE if copies else 0
        refresh = step(2 * length + budget, length) if copies else whole
        return Estimate(policy, refresh, step(budget + newest, budget), policy.period)
    if isinstance(policy, SnapKV):
        # the newest tokens, up to the budget, take the place of ranked ones, which are read for nothing
        return Estimate(policy, None, step(budget + (min(budget, length) if copies else 0), budget), 1)
    if not isinstance(policy, StreamingLLM | H2O):
        raise ValueError(f"{policy}: what its steps read is not known")
    rewritten = budget if copies and isinstance(policy, H2O) else 0  # half the budget, read and written
    partial = step(budget + rewritten, budget)
    if policy.full_stride is None:
        return Estimate(policy, None, partial, 1)
    return Estimate(policy, whole, partial, policy.full_stride)


def first_that_gains(candidates: Iterable[int], ratio: Callable[[int], float], gain: float) -> int | None:
    """The first candidate whose ratio of full attention's step to the policy's mean step is at least `gain`, or None."""
    return next((candidate for candidate in candidates if ratio(candidate) >= gain), None)
