"""The same tests for every attention implementation, against numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from recyc_jax import implementations
from recyc_jax.attention import reference, remainder, selection
from recyc_jax.attention.kept import Reads
from recyc_jax.cache import LayerCache
from recyc_jax.kernels.gpu import prefill_attention, triton_call, turn_attention

B, K, G, S, H = 2, 2, 3, 40, 8
SLOTS = jnp.arange(S)
VISIBLE = (jnp.array([[0], [13]]) <= SLOTS) & (SLOTS < 37)


@pytest.fixture(params=sorted(implementations.IMPLEMENTATIONS))
def attention(request, capfd, monkeypatch):
    if request.param != "pallas_tpu":
        monkeypatch.setattr(triton_call, "INTERPRET", jax.default_backend() == "cpu")
        yield implementations.resolve(request.param)
        return
    if jax.default_backend() == "gpu":
        # seen on an H100 with jax 0.11.2: the first call did not return within nine minutes; on CPUs, in CI, it does
        pytest.skip("JAX's interpreter of TPU kernels waits for ever on a machine with a GPU; CPUs run these")
    # two cores, and every access to a buffer is checked; jax < 0.12 prints a race instead of raising
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)):
        yield implementations.resolve(request.param)
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    q = rng.normal(size=(B, K * G, H)) * 3
    keys, values = rng.normal(size=(2, B, K, S, H))
    return tuple(jnp.asarray(x, jnp.float32) for x in (q, keys, values))


def attend(q, keys, values, seen):
    """The output and log-probabilities of one head, in float64."""
    logits = np.where(seen, keys @ q / np.sqrt(H), -np.inf)
    weights = np.exp(logits - logits.max())
    weights /= weights.sum()
    with np.errstate(divide="ignore"):
        return weights @ values, np.log(weights)


def by_heads(q, keys, values, seen):
    q, keys, values = (np.asarray(x, np.float64) for x in (q, keys, values))
    heads = [
        [attend(q[b, n], keys[b, n // G], values[b, n // G], seen(b, n // G)) for n in range(K * G)] for b in range(B)
    ]
    out = np.array([[out for out, _ in row] for row in heads])
    chances = np.array([[chance for _, chance in row] for row in heads]).reshape(B, K, G, -1)
    return out, chances.max(axis=2)


def stored(attention, keys, values):
    """A cache of these keys and values, in the layout of this implementation."""
    if attention.slots_last:
        return LayerCache(keys.swapaxes(2, 3), values.swapaxes(2, 3), True)
    return LayerCache(keys, values)


def kept_set(attention, cached, slots):
    """The kept set of these slots [B, K, R], in the order of their ranks."""
    slots = np.asarray(slots)
    scores = np.full((B, K, S), -np.inf, np.float32)
    for b, k, rank in np.ndindex(*slots.shape):
        if slots[b, k, rank] >= 0:
            scores[b, k, slots[b, k, rank]] = -rank
    (kept,) = attention.keep([cached], [jnp.asarray(scores)], slots.shape[2], slots.shape[2])
    return kept


def reads(first, length, most=S, replacing=False):
    return Reads(jnp.asarray(first, jnp.int32), jnp.int32(length), most, replacing)


NOTHING_NEW = reads([37, 37], 37, 1)


def test_full(attention, arrays):
    q, cached = arrays[0], stored(attention, *arrays[1:])
    out, scores = by_heads(*arrays, lambda b, k: np.asarray(VISIBLE[b]))
    np.testing.assert_allclose(attention.full(q, cached, VISIBLE), out, atol=1e-5)
    got_out, log_probabilities = attention.full_with_log_probabilities(q, cached, VISIBLE)
    np.testing.assert_allclose(got_out, out, atol=1e-5)
    got_scores = selection.group_maximum(log_probabilities)
    seen = np.broadcast_to(VISIBLE[:, None], scores.shape)
    np.testing.assert_allclose(np.asarray(got_scores)[seen], scores[seen], atol=1e-4)
    assert np.isfinite(got_scores).all()


@pytest.mark.parametrize(
    ("replacing", "since", "length", "most"),
    [
        (False, [37, 37], 37, 1),  # no new token
        (True, [37, 37], 37, 9),
        (True, [30, 36], 37, 9),
        (True, [20, 31], 40, 9),  # all entries and the oldest new tokens have left
        (False, [20, 37], 40, 40),  # nothing leaves
        (False, [0, 1], 3, 9),  # fewer tokens than `most`, and entries for slots that are not written yet
    ],
)
def test_kept_slots_and_newest(attention, arrays, replacing, since, length, most):
    rng = np.random.default_rng(3)
    slots = np.array([[rng.choice(20, 9, replace=False) for _ in range(K)] for _ in range(B)])
    slots[0, 0, 4:] = -1  # empty entries
    slots[1, 1, 1:] = -1
    if length < 20:
        slots[slots >= 0] = 5
        slots[..., 1:] = -1
    q, cached = arrays[0], stored(attention, *arrays[1:])

    def seen(b, k):
        listed, new = slots[b, k], np.arange(since[b], length)
        if replacing:
            listed, new = listed[: max(0, 9 - new.size)], new[-9:]
        return np.isin(np.arange(S), [*listed[(listed >= 0) & (listed < length)], *new])

    out, _ = by_heads(*arrays, seen)
    kept, asked = kept_set(attention, cached, slots), reads(since, length, most, replacing)
    np.testing.assert_allclose(kept.attend(q, cached, asked), out, atol=1e-5)
    # log-probabilities of the entries in the order of `kept.slots`, and of the newest slots in slot order
    got, of_entries, of_newest = kept.attend_with_log_probabilities(q, cached, asked)
    np.testing.assert_allclose(got, out, atol=1e-5)
    by_slot = np.zeros((B, K, G, S + 1))
    entry_slots = np.asarray(kept.slots)
    for b, k, entry in np.ndindex(*entry_slots.shape):
        by_slot[b, k, :, entry_slots[b, k, entry]] += np.exp(np.asarray(of_entries)[b, k, :, entry])
    for place in range(most):
        slot = length - most + place
        by_slot[:, :, :, slot if slot >= 0 else S] += np.exp(np.asarray(of_newest)[..., place])
    assert not by_slot[..., S].any()
    for b, k in np.ndindex(B, K):
        wide = [
            np.asarray(x, np.float64) for x in (arrays[0][b, k * G : (k + 1) * G], arrays[1][b, k], arrays[2][b, k])
        ]
        expected = [attend(query, *wide[1:], seen(b, k))[1] for query in wide[0]]
        np.testing.assert_allclose(by_slot[b, k, :, :S], np.exp(expected), atol=1e-5)


def test_moments(attention, arrays):
    """The mean key and value, and the logsumexp, of all visible slots and of a kept set with the newest slots."""
    q, cached = arrays[0], stored(attention, *arrays[1:])
    slots = np.array([[np.random.default_rng(b + k).choice(30, 9, replace=False) for k in range(K)] for b in range(B)])
    slots[0, 0, 4:] = -1
    kept, new = kept_set(attention, cached, slots), [35, 36]
    in_set = lambda b, k: np.isin(np.arange(S), [*slots[b, k][slots[b, k] >= 0], *range(new[b], 37)])  # noqa: E731
    out, log_probabilities, everything = attention.full_with_moments(q, cached, VISIBLE, jnp.int32(37))
    for got, seen in (
        (everything, lambda b, k: np.asarray(VISIBLE[b])),
        (kept.moments(q, cached, reads(new, 37, 9), with_key=True), in_set),
    ):
        mean_value, _ = by_heads(*arrays, seen)
        mean_key, _ = by_heads(q, arrays[1], arrays[1], seen)
        shape = (B, K, G, H)
        np.testing.assert_allclose(got.value, mean_value.reshape(shape), atol=1e-5)
        np.testing.assert_allclose(got.key, mean_key.reshape(shape), atol=1e-5)
        logits = np.einsum("bkgh,bksh->bkgs", np.asarray(q).reshape(shape), arrays[1]) / np.sqrt(H)
        masks = np.array([[seen(b, k) for k in range(K)] for b in range(B)])[:, :, None]
        lse = np.log(np.sum(np.where(masks, np.exp(logits), 0), axis=-1))
        np.testing.assert_allclose(got.lse, lse, atol=1e-5)
    np.testing.assert_allclose(out, attention.full(q, cached, VISIBLE), atol=1e-5)
    alone = kept.moments(q, cached, reads(new, 37, 9))
    assert alone.key is None
    rest = remainder.outside(q, everything, kept.moments(q, cached, NOTHING_NEW, with_key=True), jnp.ones(B, bool))
    for one in (rest, dataclasses.replace(rest, bias=jnp.full_like(rest.bias, -jnp.inf))):
        got = kept.attend_also(one, q, cached, reads(new, 37, 9))
        np.testing.assert_allclose(got, one.added(q, alone), atol=1e-5)
    _, expected = attention.full_with_log_probabilities(q, cached, VISIBLE)
    seen = np.broadcast_to(VISIBLE[:, None, None], expected.shape)
    np.testing.assert_allclose(np.asarray(log_probabilities)[seen], np.asarray(expected)[seen], atol=1e-5)


def test_moments_in_bfloat16_can_be_subtracted(attention, arrays):
    """The sums come with keys, so their weights are not rounded to 8 bits: the difference of two of them, a hundredth
    of each, is exact to a few percent."""
    q, keys, values = (x.astype(jnp.bfloat16) for x in arrays)
    keys = keys.at[:, :, 20].set((q.reshape(B, K, G, H)[:, :, 0] * 1.5).astype(jnp.bfloat16))  # one slot has nearly all
    cached = stored(attention, keys, values)
    everything = attention.full_with_moments(q, cached, VISIBLE, jnp.int32(37))[2]
    one = kept_set(attention, cached, np.full((B, K, 1), 20))
    kept = one.moments(q, cached, NOTHING_NEW, with_key=True)
    rest = remainder.outside(q, everything, kept, jnp.array([True, True]))
    wide = tuple(x.astype(jnp.float32) for x in (q, keys, values))
    value, _ = by_heads(*wide, lambda b, k: np.asarray(VISIBLE[b]) & (np.arange(S) != 20))
    key, _ = by_heads(wide[0], wide[1], wide[1], lambda b, k: np.asarray(VISIBLE[b]) & (np.arange(S) != 20))
    told = np.asarray(rest.bias) > -np.inf
    assert told.sum() >= 4
    for got, want in ((rest.value, value), (rest.key, key)):
        np.testing.assert_allclose(np.asarray(got)[told], want.reshape(B, K, G, H)[told], atol=0.05)


def test_rows_that_are_not_asked_for(attention, arrays):
    """The outputs of the rows that are asked for do not change."""
    rng = np.random.default_rng(5)
    slots = np.array([[rng.choice(20, 9, replace=False) for _ in range(K)] for _ in range(B)])
    q, cached = arrays[0], stored(attention, *arrays[1:])
    kept, asked = kept_set(attention, cached, slots), reads([30, 36], 37, 9, True)
    whole, scores = attention.full_with_log_probabilities(q, cached, VISIBLE)
    few = kept.attend(q, cached, asked)
    for rows in ([True, False], [True, True], [False, False]):
        got_whole, got_scores = attention.full_with_log_probabilities(q, cached, VISIBLE, jnp.asarray(rows))
        got_few = kept.attend(q, cached, asked, jnp.asarray(rows))
        for row in np.flatnonzero(rows):
            seen = np.asarray(VISIBLE[row])
            np.testing.assert_allclose(got_whole[row], whole[row], atol=1e-6)
            np.testing.assert_allclose(got_scores[row][..., seen], scores[row][..., seen], atol=1e-5)
            np.testing.assert_allclose(got_few[row], few[row], atol=1e-6)


@pytest.mark.parametrize(("starts", "count"), [([0, 33], 4), ([36, 34], 4), ([0, 33], 0), ([0, 30], 60)])
def test_the_first_slots(attention, arrays, starts, count):
    """Reads the sinks and the latest 6 of 37 slots; a row with fewer tokens than sinks reads only written slots."""
    q, cached = arrays[0], stored(attention, *arrays[1:])
    kept = attention.first_slots(cached, jnp.asarray(starts, jnp.int32), count)
    first = [max(start + count, 31) for start in starts]

    def seen(b, k):
        return np.isin(np.arange(S), [*range(starts[b], min(starts[b] + count, 37)), *range(first[b], 37)])

    out, _ = by_heads(*arrays, seen)
    np.testing.assert_allclose(kept.attend(q, cached, reads(first, 37, 6)), out, atol=1e-5)


def test_entries_are_replaced(attention, arrays):
    """At most one entry per head; one head keeps all its entries."""
    rng = np.random.default_rng(6)
    slots = np.array([[rng.choice(20, 5, replace=False) for _ in range(K)] for _ in range(B)])
    slots[1, 1, 3:] = -1
    q, cached = arrays[0], stored(attention, *arrays[1:])
    kept = kept_set(attention, cached, slots)
    before = np.asarray(kept.slots)
    entries = np.zeros(before.shape, bool)
    entries[0, 0, 1] = entries[1, 0, 4] = entries[1, 1, 4] = True
    after = np.where(entries, 33, before)
    kept = kept.replaced(cached, jnp.asarray(entries), jnp.int32(33))
    np.testing.assert_array_equal(kept.slots, after)
    out, _ = by_heads(*arrays, lambda b, k: np.isin(np.arange(S), after[b, k][after[b, k] >= 0]))
    np.testing.assert_allclose(kept.attend(q, cached, NOTHING_NEW), out, atol=1e-5)


def test_numbers_of_kept_slots_are_picked(attention, arrays):
    cached = stored(attention, *arrays[1:])
    scores = np.random.default_rng(7).integers(0, 6, (B, K, S)).astype(np.float32)  # with ties
    scores[0, :, 5:] = -np.inf
    (kept,) = attention.keep([cached], [jnp.asarray(scores)], 9, 1)
    by_slot = np.random.default_rng(8).normal(size=(B, K, G, S)).astype(np.float32)
    got = np.asarray(kept.pick(jnp.asarray(by_slot), jnp.asarray(scores)))
    slots = np.asarray(kept.slots)
    assert (slots[0] >= 0).sum() == 5 * K
    for b, k, entry in zip(*np.nonzero(slots >= 0), strict=True):
        np.testing.assert_array_equal(got[b, k, :, entry], by_slot[b, k, :, slots[b, k, entry]])


def probabilities(q, keys, seen):
    """Probabilities [B, K, G, S] in float64, for one query per row."""
    rows = [
        [np.exp(attend(*(np.asarray(x, np.float64) for x in (q[b, n], keys[b, n // G], keys[b, n // G])), seen(b))[1])
         for n in range(K * G)]
        for b in range(B)
    ]  # fmt: skip
    return np.array(rows).reshape(B, K, G, -1)


def test_each_heads_probabilities(attention, arrays):
    q, cached = arrays[0], stored(attention, *arrays[1:])
    _, log_probabilities = attention.full_with_log_probabilities(q, cached, VISIBLE)
    expected = probabilities(*arrays[:2], lambda b: np.asarray(VISIBLE[b]))
    visible = np.broadcast_to(np.asarray(VISIBLE)[:, None, None], expected.shape)
    np.testing.assert_allclose(np.exp(np.asarray(log_probabilities))[visible], expected[visible], atol=1e-6)


@pytest.mark.parametrize("window", [1, 5, 30])
def test_window_scores(attention, arrays, window):
    """The row that starts at slot 13 has 24 tokens, so a window of 30 has 24 queries there."""
    q = jnp.asarray(np.random.default_rng(3).normal(size=(B, window, K * G, H)) * 3, jnp.float32)
    cached = stored(attention, *arrays[1:])
    got = np.asarray(attention.window_scores(q, cached, jnp.array([0, 13], jnp.int32), jnp.int32(37)))
    total = 0
    for number in range(window):
        at = 37 - window + number
        real = np.array([[[[at >= start]]] for start in (0, 13)])
        here = probabilities(q[:, number], arrays[1], lambda b, at=at: (np.arange(S) >= (0, 13)[b]) & (np.arange(S) <= at)
                             if at >= (0, 13)[b] else np.ones(S, bool))  # fmt: skip
        total = total + here * real
    seen = np.asarray(VISIBLE)
    for row in range(B):
        expected = np.log(total[row].max(axis=1)[:, seen[row]])
        np.testing.assert_allclose(got[row][:, seen[row]], expected, atol=1e-4)
    if window == 1:
        scores = selection.group_maximum(attention.full_with_log_probabilities(q[:, 0], cached, VISIBLE)[1])
        np.testing.assert_allclose(got[0][:, seen[0]], np.asarray(scores)[0][:, seen[0]], atol=1e-5)


@pytest.mark.parametrize(("width", "offset"), [(8, 16), (3, 12), (3, 33), (37, 0), (10, 10)])
def test_chunk_with_mass(attention, arrays, width, offset):
    """The outputs of `chunk`, and probabilities summed over queries without those of padding."""
    q = jnp.asarray(np.random.default_rng(4).normal(size=(B, width, K * G, H)) * 3, jnp.float32)
    starts, cached = jnp.array([0, 13], jnp.int32), stored(attention, *arrays[1:])
    out, got = attention.chunk_with_mass(q, cached, starts, jnp.int32(offset))
    plain = attention.chunk(q, cached, starts, jnp.int32(offset))
    real = np.arange(offset, offset + width) >= np.asarray(starts)[:, None]
    np.testing.assert_allclose(np.asarray(out)[real], np.asarray(plain)[real], atol=1e-5)
    expected = np.zeros((B, K, G, S))
    for number in range(width):
        at = offset + number
        for row, start in enumerate((0, 13)):
            if at >= start:
                seen = (np.arange(S) >= start) & (np.arange(S) <= at)
                expected[row] += probabilities(q[:, number], arrays[1], lambda b, seen=seen: seen)[row]
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_nothing_to_see_is_finite(attention, arrays):
    nothing, cached = jnp.zeros((B, S), jnp.bool_), stored(attention, *arrays[1:])
    assert np.isfinite(attention.full(arrays[0], cached, nothing)).all()
    slots = np.full((B, K, 4), -1)
    assert np.isfinite(kept_set(attention, cached, slots).attend(arrays[0], cached, NOTHING_NEW)).all()


def test_chunk(attention, arrays):
    """The third chunk of 8 queries, in slots 16..23, over rows that start at slots 0 and 13."""
    _, keys, values = arrays
    rng = np.random.default_rng(2)
    q = jnp.asarray(rng.normal(size=(B, 8, K * G, H)) * 3, jnp.float32)
    starts = jnp.array([0, 13], jnp.int32)
    got = attention.chunk(q, stored(attention, keys, values), starts, jnp.int32(16))
    for number in range(8):
        seen = np.asarray((starts[:, None] <= SLOTS) & (17 + number > SLOTS))
        out, _ = by_heads(q[:, number], keys, values, lambda b, k, seen=seen: seen[b])
        np.testing.assert_allclose(got[:, number], out, atol=1e-5)


def test_bfloat16_keeps_float32_softmax(attention, arrays):
    half = tuple(x.astype(jnp.bfloat16) for x in arrays)
    out, log_probabilities = attention.full_with_log_probabilities(half[0], stored(attention, *half[1:]), VISIBLE)
    scores = selection.group_maximum(log_probabilities)
    exact, exact_scores = by_heads(*half, lambda b, k: np.asarray(VISIBLE[b]))
    assert out.dtype == jnp.bfloat16
    assert scores.dtype == jnp.float32
    seen = np.broadcast_to(VISIBLE[:, None], scores.shape)
    np.testing.assert_allclose(np.asarray(scores)[seen], exact_scores[seen], atol=1e-3)
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, atol=0.03)  # weights rounded to 8 bits


def test_an_unknown_name_raises():
    with pytest.raises(ValueError, match="'magic' is unknown"):
        implementations.resolve("magic")


@pytest.mark.parametrize("kernel", [prefill_attention, turn_attention])
@pytest.mark.parametrize(("width", "offset", "dim"), [(8, 16, 8), (37, 0, 80), (130, 200, 16)])
def test_chunk_kernel(kernel, width, offset, dim, monkeypatch):
    """The GPU's kernels of chunks in float32, called directly: rows that begin within a block, and odd sizes."""
    monkeypatch.setattr(triton_call, "INTERPRET", jax.default_backend() == "cpu")
    rng = np.random.default_rng(1)
    q, keys, values = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((2, width, 6, dim), (2, 2, 400, dim), (2, 2, 400, dim))
    )
    starts = jnp.asarray([max(0, offset - 70), offset + 3], jnp.int32)
    got = np.asarray(kernel.chunk(q, keys, values, starts, jnp.int32(offset)))
    slots = np.arange(400)
    for row in range(2):
        for query in range(width):
            seen = (slots <= offset + query) & (slots >= int(starts[row]))
            if not seen.any():
                continue
            for head in range(6):
                logits = np.asarray(keys[row, head // 3], np.float64)[seen] @ np.asarray(
                    q[row, query, head], np.float64
                )
                weights = np.exp((logits - logits.max()) * dim**-0.5)
                want = weights / weights.sum() @ np.asarray(values[row, head // 3], np.float64)[seen]
                np.testing.assert_allclose(got[row, query, head], want, atol=1e-5)
    assert np.isfinite(got).all()


@pytest.mark.parametrize(("width", "length", "dim"), [(1, 40, 8), (5, 40, 80), (32, 397, 16), (32, 20, 16)])
def test_window_scores_kernel(width, length, dim, monkeypatch):
    """As the reference, also in rows that are shorter than the window, and for probabilities that exp would lose."""
    monkeypatch.setattr(triton_call, "INTERPRET", jax.default_backend() == "cpu")
    rng = np.random.default_rng(2)
    q, keys, values = (
        jnp.asarray(rng.normal(size=shape) * 6, jnp.float32)
        for shape in ((2, width, 6, dim), (2, 2, 400, dim), (2, 2, 400, dim))
    )
    length, starts = max(length, width), jnp.asarray([max(0, length - 70), length - 3], jnp.int32)
    got = turn_attention.window_scores(q, keys, values, starts, jnp.int32(length))
    want = reference.window_scores(q, keys, starts, jnp.int32(length))
    for row in range(2):
        places = slice(int(starts[row]), length)
        np.testing.assert_allclose(got[row, :, places], want[row, :, places], atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize(("width", "dim"), [(1, 16), (5, 80), (24, 16)])
def test_block_kernel(width, dim, monkeypatch):
    """Drafted tokens whose rows begin in slots of their own; the first query's scores."""
    monkeypatch.setattr(triton_call, "INTERPRET", jax.default_backend() == "cpu")
    rng = np.random.default_rng(3)
    q, keys, values = (
        jnp.asarray(rng.normal(size=shape) * 2, jnp.float32)
        for shape in ((2, width, 6, dim), (2, 2, 150, dim), (2, 2, 150, dim))
    )
    starts, begins = jnp.asarray([0, 70], jnp.int32), jnp.asarray([120, 101], jnp.int32)
    cached = LayerCache(keys, values)
    got, scores = turn_attention.block_with_scores(q, keys, values, starts, begins)
    np.testing.assert_array_equal(turn_attention.block(q, keys, values, starts, begins), got)
    want, want_scores = implementations.resolve("reference").block_with_scores(q, cached, starts, begins)
    np.testing.assert_allclose(got, want, atol=1e-4)
    for row in range(2):
        seen = slice(int(starts[row]), int(begins[row]) + 1)
        np.testing.assert_allclose(scores[row, :, seen], want_scores[row, :, seen], atol=1e-4)
    for number in range(width):
        visible = (np.arange(150) >= np.asarray(starts)[:, None]) & (
            np.arange(150) <= np.asarray(begins)[:, None] + number
        )
        out = reference.full(q[:, number], keys, values, jnp.asarray(visible))
        np.testing.assert_allclose(got[:, number], out, atol=1e-4)
