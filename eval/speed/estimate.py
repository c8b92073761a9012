"""`python -m eval.speed --estimate`: the least time of decode steps on a device, without running them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from eval.speed import roofline
from eval.speed.config import Config
from eval.speed.roofline import Device
from eval.tables import letters, print_table
from recyc_jax import FullAttention, LlamaConfig, Lookahead, Policy, RecycledAttention, parse_policy

GAIN = 1.1
"""The advice says that recycling pays where a full-attention step takes this many times the policy's mean step."""


def print_estimate(config: Config, model: LlamaConfig, lengths: list[int]) -> None:
    """Print the table of least step times, and from which length and batch on recycling pays."""
    device = roofline.DEVICES[config.device]
    if config.bandwidth is not None:
        device = dataclasses.replace(device, gigabytes_per_second=config.bandwidth, reached=1.0)
    named, body = letters(config.policies), []
    for length in lengths:
        for text, letter in named.items():
            policy = parse_policy(text, length)
            found = roofline.estimate(model, policy, config.batch, length, device.copies)
            steps = [step and step.milliseconds(device, config.chips) for step in (found.full, found.partial)]
            mean = found.milliseconds(device, config.chips)
            gain = _gain(model, policy, config.batch, length, device)
            speeds = (f"{1000 * config.batch / mean:.0f}", f"{gain:.2f}")
            body.append([str(length), letter, *("-" if ms is None else f"{ms:.3f}" for ms in (*steps, mean)), *speeds])
    title = f"least ms a step, {config.model}, batch {config.batch}, {config.chips} x {device.name}"
    heading = ["length", "policy", "full", "partial", "mean", "tokens/s", "x full"]
    print_table(title, heading, body, named, keys=2)
    reached = device.gigabytes_per_second * device.reached
    print(
        f"at {reached:.0f} GB/s and {device.tera_operations:.0f} TFLOP/s a chip, bfloat16; the most that is possible,"
    )
    print("not a prediction: launches, softmax, selection and communication between chips come on top")
    for line in _advice(config, model, lengths, device):
        print(line)


def _gain(model: LlamaConfig, policy: Policy, batch: int, length: int, device: Device) -> float:
    """The least step time of full attention divided by the mean least step time of the policy."""
    full, own = (
        roofline.estimate(model, one, batch, length, device.copies).milliseconds(device)
        for one in (FullAttention(), policy)
    )
    return full / own


def _advice(config: Config, model: LlamaConfig, lengths: list[int], device: Device) -> Iterator[str]:
    """Lines that say from which length and batch on recycling pays, and which lengths exceed the memory."""
    for text in config.policies:
        policy = parse_policy(text, max(lengths))
        if not isinstance(policy, Lookahead | RecycledAttention):
            continue

        def by_length(length: int, text: str = text) -> float:
            return _gain(model, parse_policy(text, length), config.batch, length, device)

        def by_batch(batch: int, policy: Policy = policy) -> float:
            return _gain(model, policy, batch, max(lengths), device)

        length = roofline.first_that_gains(range(1024, 2**21, 1024), by_length, GAIN)
        batch = roofline.first_that_gains(range(1, 1025), by_batch, GAIN)
        from_length = f"from {length} tokens on" if length else "at no length"
        from_batch = f"from batch {batch} on" if batch else "at no batch"
        yield (
            f"{text}: {GAIN} times as fast as full attention {from_length} at batch {config.batch}; "
            f"{from_batch} at {max(lengths)} tokens"
        )
    weights = roofline.weight_bytes(model)[0]
    for length in lengths:
        row = length * roofline.token_bytes(model) + roofline.window_bytes(model, length)
        held = (weights + config.batch * row) / 1e9
        if held > device.gigabytes * config.chips:
            yield (
                f"warning: weights and cache take {held:.1f} GB at {length} tokens; "
                f"{config.chips} x {device.name} have {device.gigabytes * config.chips:.0f}"
            )
