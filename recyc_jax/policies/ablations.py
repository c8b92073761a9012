"""The paper's ablations of recycled attention: is the gain from the output of full steps or from their refresh?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from recyc_jax.attention.implementation import Implementation
from recyc_jax.policies.base import Attended, Caches, Policy, Step
from recyc_jax.policies.recycled import RecycledAttention
from recyc_jax.policies.recycled_parts import Noted, RecycledState, Rows, States


class NoRefresh(RecycledAttention):
    """Full steps attend to everything, but do not refresh the kept set."""

    method: ClassVar[str] = "recycled"

    def refresh(self, attention: Implementation, states: States, noted: Sequence[Noted], caches: Caches) -> States:
        return states

    @property
    def max_interval(self) -> None:
        return None


class NoFullAttention(RecycledAttention):
    """Full steps refresh the kept set, but their output comes from the old set. They are not counted as full."""

    method: ClassVar[str] = "recycled"

    def full_step(self, attention: Implementation, step: Step, state: RecycledState, rows: Rows = None) -> Attended:
        seen = super().full_step(attention, step, state, rows)
        return self.partial_step(attention, step, seen.state)._replace(noted=seen.noted)


VARIANTS = {"no_refresh": NoRefresh, "no_full_attention": NoFullAttention}


def variant(policy: Policy) -> Policy:
    """The policy that the generation loop runs: `policy` itself, or the ablation that its `ablation` field names. Raises
    ValueError for an ablation of another class."""
    if not isinstance(policy, RecycledAttention) or policy.ablation is None or type(policy) in VARIANTS.values():
        return policy
    if type(policy) is not RecycledAttention:
        raise ValueError(f"ablation={policy.ablation!r}: {type(policy).__name__} has no such variant")
    fields = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
    return VARIANTS[policy.ablation](**fields)
