"""`recyc_jax.testing.check_policy`: policies of this project pass, and each law that a policy can break is found broken."""

import dataclasses

import jax.numpy as jnp
import pytest
from policy_strings import STRINGS

import recyc_jax as rj
from recyc_jax.policies.base import Attended
from recyc_jax.testing import check_policy


@pytest.mark.parametrize("text", ["full", *STRINGS[::4]])
def test_our_own_pass(text):
    policy = rj.parse_policy(text)
    # H2O's budget is half for the latest tokens, and drafts have a set of their own
    check_policy(policy, whole_within_budget=not isinstance(policy, rj.H2O))


@dataclasses.dataclass(frozen=True)
class Newest(rj.Policy):
    """Reads what its subclass makes visible."""

    budget: int = 8

    def start(self, attention, prompt, caches):
        return tuple(self.begun(caches) for _ in caches.layers)

    def begun(self, caches):
        return jnp.zeros(caches.visible.shape[0], jnp.int32)

    def partial_step(self, attention, step, state):
        slots = jnp.arange(step.cached.capacity)
        visible = step.visible & (slots >= self.first(step, state))
        return Attended(attention.full(step.q, step.cached, visible), state + 1, full=jnp.zeros_like(step.done))

    def first(self, step, state):
        return (step.length - self.budget) * jnp.ones((1, 1), jnp.int32)


class ByTheBatch(Newest):
    def first(self, step, state):
        return jnp.max(step.starts) * jnp.ones((1, 1), jnp.int32)


class ByTheRoom(Newest):
    def first(self, step, state):
        return (step.length - 4 - step.cached.capacity % 7) * jnp.ones((1, 1), jnp.int32)


class Forgetful(Newest):
    """Its state is not what it reads by: a call counts steps anew."""

    def begun(self, caches):
        return caches.steps * jnp.ones(caches.visible.shape[0], jnp.int32)

    def first(self, step, state):
        return (step.length - 1 - (state % 5))[:, None]


class OneToken(Newest):
    def first(self, step, state):
        return (step.length - 1) * jnp.ones((1, 1), jnp.int32)


def test_a_correct_one_passes():
    check_policy(Newest())


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (ByTheBatch(), "depend on the other rows"),
        (ByTheRoom(), r"depend on the (room|other rows)"),
        (OneToken(), "are within its budget, and not all of them are read"),
    ],
)
def test_a_broken_law_is_said(policy, message):
    with pytest.raises(AssertionError, match=message):
        check_policy(policy)


def test_a_state_that_follows_the_room_is_found():
    with pytest.raises(AssertionError, match=r"depend on the room|in two calls|score takes other steps"):
        check_policy(Forgetful())


def test_what_is_no_policy():
    with pytest.raises(AssertionError, match="is no hashable Policy"):
        check_policy("full")
