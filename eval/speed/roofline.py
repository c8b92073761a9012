"""What a decode step must read and compute, and the least time that this takes on a device. Nothing is run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from recyc_jax.config import LlamaConfig
from recyc_jax.policies.base import Policy
from recyc_jax.policies.full import FullAttention
from recyc_jax.policies.h2o import H2O
from recyc_jax.policies.lookahead import Lookahead
from recyc_jax.policies.quest import Quest
from recyc_jax.policies.recycled import RecycledAttention
from recyc_jax.policies.snapkv import SnapKV
from recyc_jax.policies.streaming_llm import StreamingLLM
from recyc_jax.policies.top_k import TopK

TILE = 128  # slots that a TPU reads at once from a cache with the slots last


@dataclasses.dataclass(frozen=True)
class Device:
    """One chip, with the vendor's peak numbers (dense bfloat16)."""

    name: str
    tera_operations: float  # per second
    gigabytes_per_second: float
    gigabytes: float
    reached: float  # the measured fraction of the bandwidth that a copy reaches; 1 if it was not measured
    copies: bool = False  # kept sets are copies (kernels/tpu/copied_set.py)


DEVICES = {
    device.name: device
    for device in (
        Device("v5e", 197, 819, 16, 1.0, copies=True),
        Device("v5p", 459, 2765, 95, 1.0, copies=True),
        Device("v6e", 918, 1640, 32, 1.0, copies=True),
        Device("h100", 989, 3350, 80, 2900 / 3350),  # SXM; copies on the device moved 2.82 to 2.90 TB/s
        Device("h200", 989, 4800, 141, 1.0),
    )
}


@dataclasses.dataclass(frozen=True)
class Step:
    """What one kind of decode step reads (bytes) and computes (operations), for the whole batch."""

    bytes: int
    operations: int

    def milliseconds(self, device: Device, chips: int = 1) -> float:
        """The longer of the times of reading and computing, divided evenly over the chips; communication between chips
        is not counted."""
        reading = self.bytes / (device.gigabytes_per_second * device.reached * 1e9)
        return 1000 * max(reading, self.operations / (device.tera_operations * 1e12)) / chips


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The steps of a policy; `full` or `partial` is None if the policy has no such steps."""

    policy: Policy
    full: Step | None  # including the refresh, if the policy has one
    partial: Step | None
    period: int  # steps per period, the last of which is full

    def milliseconds(self, device: Device, chips: int = 1) -> float:
        """The mean time of a step. For a dynamic schedule every check counts as a full step: an upper bound."""
        full, partial = (step.milliseconds(device, chips) if step else 0.0 for step in (self.full, self.partial))
        if self.full is None or self.partial is None:
            return full + partial
        return (full + (self.period - 1) * partial) / self.period


def weight_bytes(config: LlamaConfig, size: int = 2) -> tuple[int, int]:
    """The bytes of all weights, and of those that a step reads, at `size` bytes per element. The few rows that a step
    reads of an untied input embedding are not counted."""
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    projections = config.hidden_size * dim * (2 * heads + 2 * kv_heads)
    biases = dim * (heads + 2 * kv_heads) if config.qkv_bias else 0
    norms = {None: 0, "head": 2 * dim, "projection": dim * (heads + kv_heads)}[config.qk_norm]
    norms += config.hidden_size * (4 if config.norms == "both" else 2)
    layer = projections + biases + 3 * config.hidden_size * config.intermediate_size + norms
    table = config.vocab_size * config.hidden_size
    read = config.num_hidden_layers * layer + config.hidden_size + table
    return size * (read + (0 if config.tie_word_embeddings else table)), size * read


def token_bytes(config: LlamaConfig, size: int = 2) -> int:
    """The bytes of one token's keys and values in all layers with full attention, which policies act on."""
    return len(config.full_layers) * _layer_token_bytes(config, size)


def window_bytes(config: LlamaConfig, length: int, size: int = 2) -> int:
    """The bytes of a row's keys and values in all layers with a sliding window, at `length` tokens."""
    sliding = config.num_hidden_layers - len(config.full_layers)
    return sliding * min(config.sliding_window or 0, length) * _layer_token_bytes(config, size)


def _layer_token_bytes(config: LlamaConfig, size: int) -> int:
    return 2 * config.num_key_value_heads * config.head_dim * size


def estimate(
    config: LlamaConfig, policy: Policy, batch: int, length: int, copies: bool = False, size: int = 2, shares: int = 1
) -> Estimate:
    """The steps of a policy at a context of `length` tokens, on one of `shares` devices that share the slots of rows
    evenly. With `copies`, as on TPU, a refresh reads the cache once
    more and writes the kept set, and a partial step reads whole tiles of the newest tokens. Raises ValueError for an
    unknown policy."""

    def step(read: float, scored: float) -> Step:
        """A step that, per row, moves keys and values of `read` tokens and attends to `scored` tokens."""
        moved = batch * (read * token_bytes(config, size) / shares + window_bytes(config, length, size))
        sliding = config.num_hidden_layers - len(config.full_layers)
        attended = len(config.full_layers) * scored / shares + sliding * min(config.sliding_window or 0, length)
        products = 4 * config.num_attention_heads * config.head_dim * attended
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
    if isinstance(policy, Lookahead):
        newest = -(-policy.period // TILE) * TILE + TILE if copies else 0
        groups = config.num_attention_heads // config.num_key_value_heads
        rest = groups * 4 // size if policy.remainder else 0  # a float32 key and value for each query head
        refresh = step(2 * length + 2 * budget, length + budget) if copies else step(length + budget, length + budget)
        return Estimate(policy, refresh, step(budget + newest + rest, budget), policy.period)
    if isinstance(policy, Quest):
        dense = min(policy.dense_layers, len(config.full_layers)) / max(1, len(config.full_layers))
        bounds = length / policy.page  # two keys a page, as many bytes as a key and a value
        read = min(length, policy.budget + bounds)
        return Estimate(policy, None, step(dense * length + (1 - dense) * read, dense * length + (1 - dense) * read), 1)
    if isinstance(policy, TopK):
        return Estimate(policy, None, step(length / 2 + budget, length + budget), 1)  # every key, then some again
    if isinstance(policy, SnapKV):
        # with copies, up to `budget` newest tokens are read in addition to the set entries that they replace
        return Estimate(policy, None, step(budget + (min(budget, length) if copies else 0), budget), 1)
    if not isinstance(policy, StreamingLLM | H2O):
        raise ValueError(f"{policy}: what its steps read is not known")
    rewritten = budget if copies and isinstance(policy, H2O) else 0  # half the budget is read and written again
    partial = step(budget + rewritten, budget)
    if policy.full_stride is None:
        return Estimate(policy, None, partial, 1)
    return Estimate(policy, whole, partial, policy.full_stride)


def tokens_read(config: LlamaConfig, policy: Policy, length: int, stride: float | None = None) -> float:
    """The mean number of cached tokens (a key and a value each) that a step reads per layer and key/value head, with
    full steps and what a method reads in order to choose. `stride` is the number of steps per full step, where that
    was measured."""
    if not config.full_layers:
        raise ValueError("every layer has a sliding window: policies read nothing")
    found = estimate(config, policy, 1, length)
    weights = weight_bytes(config)[1] + window_bytes(config, length)
    full, partial = (
        (step.bytes - weights) / token_bytes(config) if step else 0.0 for step in (found.full, found.partial)
    )
    if found.full is None or found.partial is None:
        return full + partial
    return partial + (full - partial) / (stride or found.period)


def first_that_gains(candidates: Iterable[int], ratio: Callable[[int], float], gain: float) -> int | None:
    """The first candidate (a length or batch) for which `ratio`, the time of a full-attention step divided by the
    policy's mean, is at least `gain`; None if there is none."""
    return next((candidate for candidate in candidates if ratio(candidate) >= gain), None)
