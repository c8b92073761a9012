"""What a model reads while it answers, as recorded step by step and as the page shows it."""

import html
import math
import re
import shutil
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import TEXT, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st

import recyc_jax as rj
from recyc_jax.attention import reference
from recyc_jax.attention.kept import KeptSlots, Reads
from recyc_jax.cache import LayerCache
from recyc_jax.inspect.page import page, texts_of
from recyc_jax.inspect.watched import StepSeen, Watched, steps

POLICIES = (
    "lookahead:budget=16,stride=4",
    "recycled:budget=16,stride=4",
    "snapkv:budget=16",
    "streaming_llm:budget=16",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect") / "model"
    write_folder(folder)
    return folder


@pytest.fixture(scope="module")
def lm(folder):
    return rj.load_pretrained(str(folder))


@pytest.fixture(scope="module")
def ids(lm):
    return lm.tokenizer(TEXT)["input_ids"]


@settings(deadline=None)
@given(st.integers(0, 2**30), st.booleans(), st.integers(1, 12))
def test_a_kept_sets_mask_is_what_it_attends_to(seed, replacing, length):
    rng = np.random.default_rng(seed)
    capacity, size = 12, 5
    first = int(rng.integers(0, length + 1))
    kept = KeptSlots(jnp.asarray([rng.permutation(capacity)[:size], rng.permutation(capacity)[:size]], jnp.int32)[None])
    reads = Reads(jnp.asarray([first]), jnp.asarray(length), length - first, replacing)
    q = jnp.asarray(rng.normal(size=(1, 4, 8)), jnp.float32)
    cached = LayerCache(*(jnp.asarray(rng.normal(size=(1, 2, capacity, 8)), jnp.float32) for _ in range(2)))
    mask = kept.mask(reads, capacity)
    whole, _ = reference.over_pieces(q, [(cached.keys, cached.values, mask)])
    if bool(mask.any(axis=2).all()):
        # a slot that is kept and among the newest would be read twice: refreshes never leave such
        twice = np.isin(np.asarray(kept.slots), np.arange(first, length)).any()
        if not twice:
            np.testing.assert_allclose(kept.attend(q, cached, reads), whole, atol=1e-5)


@pytest.mark.parametrize("policy", ["full", *POLICIES])
def test_steps_are_those_of_the_policy(lm, ids, policy):
    parsed = rj.parse_policy(policy)
    out = rj.generate(lm.params, lm.config, [ids], policy=parsed, max_new_tokens=12)
    first, *seen = steps(lm, ids, parsed, 12)
    tokens = [first, *(step.token for step in seen)]
    assert tokens == out.tokens[0, : int(out.lengths[0])].tolist()
    assert sum(step.is_full for step in seen).tolist() == out.full_steps[0].tolist()
    for number, step in enumerate(seen, start=1):
        count = len(ids) + number
        assert step.is_read.shape[2] == count
        assert step.is_read[..., -1].all()  # the newest token
        read = step.is_read.sum(axis=2)
        for layer, is_full in enumerate(step.is_full):
            assert (read[layer] == count).all() if is_full else (read[layer] <= 16 + (policy[:4] == "look") * 4).all()
        np.testing.assert_allclose(step.covered[step.is_full], 1, atol=1e-3)
        assert (step.covered < 1.001).all()
        assert (step.tokens < count).all()
        assert (np.diff(step.probabilities, axis=-1) <= 0).all()


def test_attention_is_that_of_the_model(lm, ids):
    """The most attended token of each head, by a plain pass over the same tokens."""
    first, seen = list(steps(lm, ids, rj.FullAttention(), 2))
    tokens, found = jnp.asarray([[*ids, first]]), []

    def attend(layer, heads, state):
        kv_heads, groups = heads.k.shape[2], heads.q.shape[2] // heads.k.shape[2]
        logits = jnp.einsum("ngh,snh->ngs", heads.q[0, -1].reshape(kv_heads, groups, -1), heads.k[0])
        found.append(np.asarray(jax.nn.softmax(logits * heads.q.shape[-1] ** -0.5, axis=-1).mean(axis=1)))
        return reference.causal(heads.q, heads.k, heads.v), state

    from recyc_jax import model

    positions = jnp.arange(tokens.shape[1])[None]
    states = (None,) * lm.config.num_hidden_layers
    model.hidden_states(lm.params, lm.config, tokens, positions, attend, states, positions[:, -1] + 1)
    for layer, weights in enumerate(found):
        got = np.take_along_axis(weights, seen.tokens[layer], axis=-1)
        np.testing.assert_allclose(seen.probabilities[layer], got, atol=1e-5)
        np.testing.assert_allclose(seen.probabilities[layer, :, 0], weights.max(axis=-1), atol=1e-5)


@pytest.mark.parametrize("policy", ["h2o:budget=8", "quest:budget=16", "top_k:budget=8", "recycled:budget=8,draft=3"])
def test_a_policy_that_tells_nothing_is_refused(policy):
    with pytest.raises(ValueError, match="does not tell what its steps read: there is full, lookahead"):
        Watched(rj.parse_policy(policy))


def test_texts_are_those_of_the_tokens(lm):
    text = "The naïve café costs 5 € — 😀<eos>"
    ids = lm.tokenizer(text)["input_ids"]
    assert "".join(texts_of(lm.tokenizer, ids)) == text


# --- in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here to open the page in")


def opened(path, anchor):
    """The page's elements after its script has run."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom"]
    ran = subprocess.run(
        [*command, f"{path.as_uri()}#{anchor}"], capture_output=True, text=True, timeout=120, check=True
    )
    return ran.stdout


def shades(dom):
    """The level of each token of the document."""
    document = re.search(r'<section id="document".*?</section>', dom, re.DOTALL)[0]
    return [int((re.search(r"k(\d)", span) or "00")[1]) for span in re.findall(r"<span[^>]*>", document)]


def wanted(is_read, count):
    """The levels of a mask [L, K, N] for the first `count` tokens."""
    kept = is_read[..., :count].reshape(-1, count).sum(axis=0)
    heads = is_read.shape[0] * is_read.shape[1]
    return [math.ceil(8 * one / heads) for one in kept]


@needs_browser
def test_the_page_shows_what_was_seen(folder, lm, ids, tmp_path, call_module):
    (tmp_path / "doc.txt").write_text(TEXT.replace(". ", ".\n<b>&amp;</script> "))
    policy, out = "lookahead:budget=16,stride=4", tmp_path / "page.html"
    flags = (
        "--file",
        tmp_path / "doc.txt",
        "--question",
        "What is green?",
        "--template",
        "base",
        "--max-new-tokens",
        12,
    )
    ran = call_module("recyc_jax.inspect", "--model", folder, "--policy", policy, *flags, "--out", out)
    assert ran.returncode == 0, ran.stderr
    assert "open it in a browser" in ran.stderr
    prompt = lm.tokenizer((tmp_path / "doc.txt").read_text() + "\n\nWhat is green?")["input_ids"]
    first, *seen = steps(lm, prompt, rj.parse_policy(policy), 12)
    assert lm.tokenizer.decode([first, *(step.token for step in seen)], skip_special_tokens=True) in ran.stdout
    assert "http" not in out.read_text().replace("http-equiv", "")  # nothing comes from elsewhere
    for number in (1, 2, 5, 7):
        dom = opened(out, f"step={number}")
        assert shades(dom) == wanted(seen[number - 1].is_read, len(prompt))
        assert dom.count('aria-pressed="true"') == 1
        best = re.search(r'<ol class="best" id="best">(.*?)</ol>', dom, re.DOTALL)[1]
        weights = np.zeros(len(prompt) + number)
        for tokens, its in zip(
            seen[number - 1].tokens.reshape(-1, 16), seen[number - 1].probabilities.reshape(-1, 16), strict=True
        ):
            np.add.at(weights, tokens, its / (seen[0].tokens.shape[0] * seen[0].tokens.shape[1]))
        shown = [float(percent) for percent in re.findall(r"<b>([\d.]+)%</b>", best)]
        np.testing.assert_allclose(shown, 100 * np.sort(weights)[::-1][:12], atol=0.5)
    dom = opened(out, "refresh=1&layer=1&head=0")
    assert shades(dom) == wanted(
        seen[4].is_read[1:2, :1], len(prompt)
    )  # step 5 is the first after step 4, which is full
    assert "after step 4" in dom
    document = re.search(r'<section id="document".*?</section>', dom, re.DOTALL)[0]
    said = html.unescape(re.sub(r"<[^>]*>", "", document))
    assert said == (tmp_path / "doc.txt").read_text() + "\n\nWhat is green?"  # its own marks are text


@needs_browser
def test_a_long_document_opens_soon(tmp_path):
    """32,768 tokens, 24 layers of 2 heads, 64 steps: as a 0.5B model has."""
    rng, count, seen = np.random.default_rng(0), 32768, []
    mask = rng.random((24, 2, count + 64)) < 1 / 32
    for number in range(1, 64):
        best = rng.integers(0, count, (24, 2, 16))
        is_full = np.full(24, number % 20 == 0)
        seen.append(
            StepSeen(
                5, is_full, mask[..., : count + number] | is_full[0], best, rng.random((24, 2, 16)), rng.random((24, 2))
            )
        )
    texts = ["word " if number % 20 else "word.\n" for number in range(count + 64)]
    (tmp_path / "page.html").write_text(page(texts, count, seen, list(range(24)), "random"))
    assert (tmp_path / "page.html").stat().st_size < 8e6
    began = time.monotonic()
    dom = opened(tmp_path / "page.html", "step=3")
    assert time.monotonic() - began < 40
    assert shades(dom) == wanted(mask, count)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--question", " "), "--question is empty"),
        (("--question", "x", "--file", "nowhere.txt"), "--file nowhere.txt"),
        (
            ("--question", "x", "--out", "nowhere/page.html"),
            "--out nowhere/page.html: name a file in a folder that is there",
        ),
        (("--question", "x", "--policy", "h2o:budget=8"), "does not tell what its steps read"),
        (("--question", "x " * 4096), "the model's context 4096"),
        (("--question", "x", "--max-new-tokens", "0"), "--max-new-tokens 0 must be at least 1"),
    ],
)
def test_what_is_wrong_is_said(folder, call_module, flags, message):
    ran = call_module("recyc_jax.inspect", "--model", folder, *flags)
    assert ran.returncode == 2
    assert message in ran.stderr
