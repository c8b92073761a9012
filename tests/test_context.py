"""What lies beyond the model's context or vocabulary is refused by name, or visible where it cannot be refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import recyc_jax as rj

LAYERS = 1


@pytest.mark.parametrize(
    ("length", "new", "fits"), [(500, 13, True), (500, 14, False), (512, 1, True), (513, 1, False)]
)
def test_prompts_and_their_new_tokens_fit_the_context(config, params, length, new, fits):
    """The last new token is never fed, so it needs no position."""
    assert config.max_position_embeddings == 512
    prompts = [[1] * length, [2, 3]]
    if fits:
        rj.prefill(params, config, prompts, max_new_tokens=new)
        return
    with pytest.raises(
        ValueError, match=rf"a prompt of {length} tokens and {new} new ones exceed .* 512 .*allow_beyond"
    ):
        rj.generate(params, config, prompts, max_new_tokens=new)
    rj.prefill(params, config, prompts, max_new_tokens=new, allow_beyond_context=True)


def test_lengths_count_and_padding_does_not(config, params):
    tokens = np.ones((1, 600), np.int32)
    rj.prefill(params, config, tokens, prompt_lengths=np.asarray([20]), max_new_tokens=4)
    with pytest.raises(ValueError, match="a prompt of 600 tokens"):
        rj.prefill(params, config, tokens, max_new_tokens=4)


def test_scores_beyond_the_context_are_refused(config, params):
    tokens = np.ones((1, 513), np.int32)
    with pytest.raises(ValueError, match="a prompt of 510 tokens and 4 new ones"):
        rj.score(params, config, np.ones((1, 514), np.int32), policy="full", context_length=510)
    rj.score(params, config, tokens, policy="full", context_length=511)
    rj.score(params, config, np.ones((1, 514), np.int32), policy="full", context_length=510, allow_beyond_context=True)


@pytest.mark.parametrize("culprit", [96, 1000, -1])
def test_ids_outside_the_vocabulary(config, params, culprit):
    """Refused by name, or where ids are not known NaN from the first such id on."""
    tokens = jnp.asarray([[3, culprit, 5], [3, 4, 5]])
    with pytest.raises(ValueError, match=f"prompt 0 has token id {culprit}, outside the vocabulary of 96"):
        rj.forward(params, config, tokens)
    traced = np.asarray(jax.jit(lambda tokens: rj.forward(params, config, tokens))(tokens))
    known = np.asarray(rj.forward(params, config, jnp.asarray([[3, 4, 5]])))
    assert np.isnan(traced[0, 1:]).all()
    np.testing.assert_array_equal(traced[0, 0], traced[1, 0])
    np.testing.assert_allclose(traced[1], known[0], atol=1e-6)
