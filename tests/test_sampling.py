"""Samplers: distributions, restrictions and keys."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import environment

import recyc_jax as rj

LAYERS = 1  # laws of the loop, not of layers

LOGITS = jnp.log(jnp.array([0.4, 0.3, 0.15, 0.1, 0.05]))
DRAWS = 20_000


@pytest.mark.parametrize("kind", ["rbg", "unsafe_rbg", "threefry2x32"])
def test_rows_draw_alone_what_they_draw_in_a_batch(config, params, kind):
    """Also with keys of generators whose batches draw from the first key alone."""
    prompts, keys = [[5, 6, 7], list(range(2, 40)), [9]], jax.random.split(jax.random.key(3, impl=kind), 3)

    def draw(some, key):
        return rj.generate(
            params, config, some, max_new_tokens=8, eos_ids=(), sampling=rj.Sample(), key=key
        ).tokens.tolist()

    together = draw(prompts, keys)
    assert [draw([prompt], keys[row : row + 1])[0] for row, prompt in enumerate(prompts)] == together
    assert draw(prompts[::-1], keys[::-1]) == together[::-1]
    one = draw(prompts, keys[0])
    assert len(set(map(tuple, draw([prompts[0]] * 3, keys[0])))) > 1  # one key gives each row its own
    assert draw(prompts, keys[0]) == one


@pytest.mark.parametrize("kind", ["rbg", "unsafe_rbg"])
def test_a_sampler_draws_independently_with_any_keys(kind):
    keys = jax.random.split(jax.random.key(0, impl=kind), DRAWS)
    drawn = rj.Sample()(jnp.broadcast_to(LOGITS, (DRAWS, 5)), keys, jnp.int32(3))
    np.testing.assert_allclose(np.bincount(drawn, minlength=5) / DRAWS, [0.4, 0.3, 0.15, 0.1, 0.05], atol=0.015)


@pytest.mark.parametrize(
    ("logits", "top_p", "kept"),
    [
        ([0.0] * 8, 0.45, 4),
        ([np.log(0.4)] + [np.log(0.01)] * 60, 0.495, 11),
        ([1.0, 1.0, 0.0], 0.3, 1),
        ([-np.inf, 0.0, 0.0, -np.inf], 0.9, 2),
        ([0.0] * 8, 1e-6, 1),
    ],
)
def test_of_equal_tokens_top_p_keeps_no_more_than_it_needs(logits, top_p, kept):
    """As in transformers; of the equal ones those with the lower ids."""
    keys = jax.random.split(jax.random.key(0), 4000)
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (4000, len(logits)))
    drawn = set(np.asarray(rj.Sample(top_p=top_p)(rows, keys, jnp.int32(0))).tolist())
    finite = [token for token, logit in enumerate(logits) if np.isfinite(logit)]
    assert drawn == set(sorted(finite, key=lambda token: (-logits[token], token))[:kept])


@pytest.mark.parametrize(("size", "top_p"), [(10, 0.1), (12, 0.5), (12, 0.75), (20, 0.1), (100, 0.25), (1000, 0.25)])
def test_of_equal_tokens_top_p_keeps_as_many_as_transformers(size, top_p):
    """Also where the sum of their probabilities meets top_p up to rounding."""
    torch = pytest.importorskip("torch", reason="torch is not installed: not compared with transformers' samplers")
    from transformers import TopPLogitsWarper

    theirs = int(torch.isfinite(TopPLogitsWarper(top_p)(None, torch.zeros(1, size))).sum())
    rows, keys = jnp.zeros((8 * size, size), jnp.float32), jax.random.split(jax.random.key(0), 8 * size)
    drawn = np.asarray(rj.Sample(top_p=top_p)(rows, keys, jnp.int32(0)))
    assert drawn.max() < theirs
    assert abs(len(set(drawn.tolist())) - theirs) <= theirs * 0.02


@pytest.mark.parametrize("arguments", [dict(top_k=0), dict(top_k=True), dict(top_p=0.0), dict(top_p=1.5)], ids=str)
def test_odd_restrictions_are_named(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        rj.Sample(**arguments)


def frequencies(sampler):
    keys = jax.random.split(jax.random.key(0), DRAWS)
    drawn = sampler(jnp.broadcast_to(LOGITS, (DRAWS, 5)), keys, jnp.int32(3))
    return np.bincount(drawn, minlength=5) / DRAWS


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (rj.Sample(), [0.4, 0.3, 0.15, 0.1, 0.05]),
        (rj.Sample(temperature=0.5), np.array([0.16, 0.09, 0.0225, 0.01, 0.0025]) / 0.285),
        (rj.Sample(top_k=2), [4 / 7, 3 / 7, 0, 0, 0]),
        (rj.Sample(top_k=50), [0.4, 0.3, 0.15, 0.1, 0.05]),
        (rj.Sample(top_p=0.8), np.array([0.4, 0.3, 0.15, 0, 0]) / 0.85),
        (rj.Sample(top_p=0.01), [1, 0, 0, 0, 0]),
        (rj.Sample(top_p=1.0), [0.4, 0.3, 0.15, 0.1, 0.05]),
        (rj.Sample(top_k=4, top_p=0.75), np.array([0.4, 0.3, 0.15, 0, 0]) / 0.85),  # 0.75 * 0.95 = 0.7125 of the mass
    ],
)
def test_draws_follow_the_distribution(sampler, expected):
    np.testing.assert_allclose(frequencies(sampler), expected, atol=4 * 0.5 / DRAWS**0.5)


def test_greedy_takes_the_first_of_ties():
    assert rj.Greedy()(jnp.array([[0.0, 2.0, 2.0]]), None, jnp.int32(0)).tolist() == [1]


@pytest.mark.parametrize(
    "options", [dict(temperature=0.0), dict(temperature=-1.0), dict(top_k=0), dict(top_p=0.0), dict(top_p=1.1)]
)
def test_bad_options_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        rj.Sample(**options)


def test_rows_draw_alone(params, config):
    """A row's draws depend on its key and step, not on its neighbours; from one key, every row gets its own key."""
    run = dict(max_new_tokens=12, sampling=rj.Sample(temperature=2.0), eos_ids=())
    prompts = [[4, 5, 6]] * 3
    key = jax.random.key(7)
    together = rj.generate(params, config, prompts, key=key, **run).tokens
    assert len({tuple(row) for row in together.tolist()}) == 3
    row_keys = jnp.stack([jax.random.fold_in(key, row) for row in range(3)])
    np.testing.assert_array_equal(together, rj.generate(params, config, prompts, key=row_keys, **run).tokens)
    alone = rj.generate(params, config, prompts[:1], key=row_keys[2:], **run).tokens
    np.testing.assert_array_equal(together[2], alone[0])
    raw = rj.generate(params, config, prompts, key=jax.random.key_data(key), **run).tokens
    np.testing.assert_array_equal(together, raw)
    assert (
        np.asarray(together) != np.asarray(rj.generate(params, config, prompts, key=jax.random.key(8), **run).tokens)
    ).any()


def test_numbers_of_rows_may_be_lists(params, config):
    """Lists are as arrays, and what float32 cannot divide by is refused."""
    prompts = [[5, 9, 3], [7, 8]]
    options = dict(max_new_tokens=6, eos_ids=(), key=jax.random.key(0))
    lists, arrays = (
        rj.generate(params, config, prompts, sampling=rj.Sample(kind([0.5, 1.5]), top_p=kind([0.9, 0.8])), **options)
        for kind in (list, np.asarray)
    )
    np.testing.assert_array_equal(lists.tokens, arrays.tokens)
    for temperature in (0, 1e-45, 1e-39, [1.0, 0.0]):
        with pytest.raises(ValueError, match="must be above 1e-30"):
            rj.Sample(temperature)


def test_a_bias_of_minus_infinity_forbids(params, config):
    out = rj.generate(params, config, [[5, 9, 3]], max_new_tokens=1, eos_ids=())
    forbidden = int(out.tokens[0, 0])
    sampling = rj.chain(rj.LogitBias.of({forbidden: -np.inf}))
    assert (
        int(rj.generate(params, config, [[5, 9, 3]], max_new_tokens=1, eos_ids=(), sampling=sampling).tokens[0, 0])
        != forbidden
    )
    with pytest.raises(ValueError, match="bias of token 3"):
        rj.LogitBias.of({3: float("nan")})


WITHOUT_JIT = """
import jax, numpy as np
import recyc_jax as rj

config = rj.LlamaConfig.tiny()
params = rj.init_params(config, jax.random.key(1))
options = dict(max_new_tokens=3, eos_ids=(), policy="lookahead:budget=4,stride=2")
want = rj.generate(params, config, [[5, 9, 3]], **options).tokens
with jax.disable_jit():
    np.testing.assert_array_equal(rj.generate(params, config, [[5, 9, 3]], **options).tokens, want)
"""


def test_tokens_without_jit():
    """JAX_DISABLE_JIT, with which users look into programs; in a process whose types are not checked, since indices of
    loops are then Python's numbers."""
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_JIT], env=environment(), capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
