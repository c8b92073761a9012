"""Processors and restrictions against transformers', and programs that do not depend on their numbers."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import recyc_jax as rj
from recyc_jax import decoding

PROMPT, NEW = [5, 9, 3, 40, 41, 9], 14


def torch_or_skip():
    return pytest.importorskip("torch", reason="torch is not installed: not compared with transformers' processors")


@settings(max_examples=60, deadline=None)
@given(
    temperature=st.floats(0.2, 3),
    top_k=st.none() | st.integers(1, 60),
    top_p=st.none() | st.floats(0.0625, 1, width=32),  # what it is computed in: below that, 1 - 1e-16 is 1
    min_p=st.none() | st.floats(0, 1),
    seed=st.integers(0, 10**6),
)
def test_restrictions_are_those_of_transformers(temperature, top_k, top_p, min_p, seed):
    """The same tokens are kept, with the same probabilities; but for tokens at the edge up to rounding."""
    torch = torch_or_skip()
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = np.random.default_rng(seed).normal(size=(3, 50)).astype(np.float32) * 3
    warpers = [TemperatureLogitsWarper(float(temperature))]
    warpers += [TopKLogitsWarper(top_k)] if top_k is not None else []
    warpers += [TopPLogitsWarper(float(top_p))] if top_p is not None and top_p < 1 else []
    warpers += [MinPLogitsWarper(float(min_p))] if min_p is not None else []
    theirs = torch.tensor(logits)
    for warper in warpers:
        theirs = warper(None, theirs)
    ours = np.asarray(rj.Sample(temperature, top_k, top_p, min_p).restricted(jnp.asarray(logits)))
    theirs = theirs.numpy()
    differs = np.isfinite(ours) != np.isfinite(theirs)
    assert differs.sum() <= 1  # a sum of probabilities that meets top_p in the last bit
    if not differs.any():
        np.testing.assert_allclose(jax.nn.softmax(ours), jax.nn.softmax(theirs), atol=1e-5)


def test_numbers_for_each_row():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 50)), jnp.float32)
    values = dict(temperature=[0.5, 1.0, 2.0], top_k=[3, 50, 10], top_p=[1.0, 0.5, 0.9], min_p=[0.0, 0.1, 0.01])
    together = rj.Sample(**{name: jnp.asarray(of) for name, of in values.items()}).restricted(logits)
    for row in range(3):
        alone = rj.Sample(**{name: of[row] for name, of in values.items()}).restricted(logits[row : row + 1])
        np.testing.assert_array_equal(together[row], alone[0])
    with pytest.raises(ValueError, match="for 3 rows"):
        rj.Sample(jnp.ones(2)).restricted(logits)


@pytest.mark.parametrize("policy", ["full", "recycled:budget=100,stride=4"])
@pytest.mark.parametrize(
    "names",
    [("repetition",), ("bias",), ("min",), ("presence",), ("repetition", "bias", "min", "presence")],
    ids="-".join,
)
def test_greedy_with_processors_is_transformers(params, config, policy, names):
    """Token for token against a loop over whole sequences with transformers' processors."""
    torch = torch_or_skip()
    from transformers import (
        MinNewTokensLengthLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
        SequenceBiasLogitsProcessor,
    )

    plain = rj.generate(params, config, [PROMPT], max_new_tokens=NEW, eos_ids=()).tokens[0]
    eos, bias = int(plain[3]), {int(plain[0]): -5.0, 17: 1.5}
    theirs = dict(
        repetition=RepetitionPenaltyLogitsProcessor(1.7),
        bias=SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()}),
        min=MinNewTokensLengthLogitsProcessor(len(PROMPT), 9, eos),
    )
    ours = dict(
        repetition=rj.RepetitionPenalty(1.7),
        bias=rj.LogitBias.of(bias),
        min=rj.MinNewTokens(9),
        presence=rj.CountPenalty(presence=0.7, frequency=0.4),
    )
    ids = list(PROMPT)
    for _ in range(NEW):
        logits = np.array(rj.forward(params, config, jnp.asarray([ids]))[:, -1], np.float32)
        for name in names:
            if name == "presence":
                counts = np.bincount(ids[len(PROMPT) :], minlength=config.vocab_size)
                logits = logits - 0.7 * (counts > 0) - np.float32(0.4) * counts
            else:
                logits = theirs[name](torch.tensor([ids]), torch.tensor(logits)).numpy()
        ids.append(int(logits[0].argmax()))
        if ids[-1] == eos:
            break
    chain = rj.chain(*(ours[name] for name in names))
    out = rj.generate(params, config, [PROMPT, [7, 8]], policy=policy, max_new_tokens=NEW, eos_ids=eos, sampling=chain)
    assert out.tokens[0, : int(out.lengths[0])].tolist() == ids[len(PROMPT) :]


def test_a_chain_goes_on_and_streams(params, config):
    """What processors carry goes on with the state."""
    chain = rj.chain(rj.RepetitionPenalty(1.5), rj.CountPenalty(0.5, 0.2), rj.Sample(1.5, top_k=20))
    options = dict(policy="recycled:budget=5,stride=4", sampling=chain, key=jax.random.key(1), eos_ids=())
    whole = rj.generate(params, config, [PROMPT, [7, 8]], max_new_tokens=NEW, **options)
    state = rj.prefill(params, config, [PROMPT, [7, 8]], policies=options["policy"], max_new_tokens=NEW)
    parts = []
    for count in (2, 5, NEW - 7):
        out, state = rj.decode(params, config, state, max_new_tokens=count, rewind=False, **options)
        parts.append(out.tokens)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole.tokens)


def test_other_numbers_need_no_other_program(params, config):
    def run(temperature, top_p, penalty):
        chain = rj.chain(rj.RepetitionPenalty(penalty), rj.Sample(temperature, top_p=top_p))
        return rj.generate(params, config, [PROMPT], max_new_tokens=NEW, sampling=chain, key=jax.random.key(0))

    run(0.7, 0.9, 1.1)
    before = decoding.decode_tokens._cache_size()
    for numbers in ((0.8, 0.95, 1.2), (2, 1.0, 1.0), (0.3, 0.5, 3)):
        run(*numbers)
    assert decoding.decode_tokens._cache_size() == before


def test_log_probabilities(params, config):
    """The chosen tokens' and the most likely ones', of the model itself."""
    chain = rj.chain(rj.LogitBias.of({17: 3.0}), rj.Sample(2.0))
    out = rj.generate(
        params, config, [PROMPT, [7, 8]], max_new_tokens=5, eos_ids=(), sampling=chain, key=jax.random.key(0),
        top_log_probabilities=3,
    )  # fmt: skip
    for row, prompt in enumerate((PROMPT, [7, 8])):
        ids = [*prompt, *out.tokens[row].tolist()]
        logits = rj.forward(params, config, jnp.asarray([ids]))[0, len(prompt) - 1 : -1]
        want = jax.nn.log_softmax(logits)
        np.testing.assert_allclose(out.log_probabilities[row], want[np.arange(5), ids[len(prompt) :]], atol=1e-4)
        best, where = jax.lax.top_k(want, 3)
        np.testing.assert_allclose(out.top_log_probabilities[row], best, atol=1e-4)
        np.testing.assert_array_equal(out.top_tokens[row], where)
    only = rj.generate(params, config, [PROMPT], max_new_tokens=5, top_log_probabilities=0)
    assert only.log_probabilities.shape == (1, 5)
    assert only.top_tokens.shape == (1, 5, 0)


def test_stop_sequences(params, config):
    whole = rj.generate(params, config, [PROMPT, [7, 8]], max_new_tokens=NEW, eos_ids=())
    tokens = whole.tokens[0].tolist()
    stop = [tokens[4:7], [90, 91, 92, 93]]
    out = rj.generate(params, config, [PROMPT, [7, 8]], max_new_tokens=NEW, eos_ids=(), stop=stop)
    end = next(at for at in range(3, NEW + 1) if tokens[at - 3 : at] == stop[0])
    assert int(out.lengths[0]) == end
    assert out.tokens[0, :end].tolist() == tokens[:end]
    with pytest.raises(ValueError, match="stop="):
        rj.generate(params, config, [PROMPT], stop=[[]])


@flax.struct.dataclass
class Alternate(rj.Processor):
    """An example of one's own: even token ids after odd ones, and odd ones after even ones."""

    def start(self, seen, eos_ids):
        return jnp.zeros(seen.shape[0], jnp.int32)

    def __call__(self, logits, state, step):
        return jnp.where(jnp.arange(logits.shape[1]) % 2 == state[:, None] % 2, logits, -jnp.inf)

    def update(self, state, token):
        return token + 1


def test_processors_and_samplers_of_ones_own(params, config):
    out = rj.generate(params, config, [PROMPT], max_new_tokens=8, eos_ids=(), sampling=rj.chain(Alternate()))
    assert (out.tokens[0] % 2).tolist() == [0, 1] * 4

    def second(logits, row_keys, step):
        return jax.lax.top_k(logits, 2)[1][:, 1].astype(jnp.int32)

    out = rj.generate(params, config, [PROMPT], max_new_tokens=1, eos_ids=(), sampling=second)
    logits = rj.forward(params, config, jnp.asarray([PROMPT]))[0, -1]
    assert int(out.tokens[0, 0]) == int(jnp.argsort(-logits)[1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rj.chain(rj.Sample(), rj.MinNewTokens(2)), "is no processor"),
        (lambda: rj.chain(3), "sampling=3 must be"),
        (lambda: rj.MinNewTokens(1.5), "count=1.5 must be a whole number"),
        (lambda: rj.RepetitionPenalty(0), "penalty=0 must be above 0"),
        (lambda: rj.Sample(float("nan")), "temperature=nan"),
        (lambda: rj.Sample(min_p=2), "min_p=2 must be at least 0 and at most 1"),
        (lambda: rj.Sample(np.array([0.5, -1])), "temperature="),
        (lambda: rj.LogitBias.of({-1: 0.0}), "token id"),
    ],
)
def test_odd_numbers_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
