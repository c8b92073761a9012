"""The real model, SmolLM2-135M-Instruct: predictions against Hugging Face's own implementation in float32."""

import jax.numpy as jnp
import numpy as np
import pytest

import recyc_jax as rj
from eval.ruler import cells, material, scoring
from eval.ruler.tasks.base import Material
from eval.ruler.tasks.long_answers import LONG_TASKS
from eval.ruler.tasks.registry import TASKS
from recyc_jax.loading import pretrained

PROSE = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife. "
    "The special magic number for quiet-river is: 4217350. However little known the feelings or views of such a man may be "
    "on his first entering a neighbourhood, this truth is so well fixed in the minds of the surrounding families. "
    "What is the special magic number for quiet-river? The special magic number for quiet-river is"
)


@pytest.fixture(scope="module")
def lm():
    return rj.load_pretrained("smollm2-135m", dtype=jnp.float32)


@pytest.fixture(scope="module")
def hf():
    torch = pytest.importorskip("torch", reason="the reference extra (torch) is not installed")
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(pretrained.resolve("smollm2-135m"), dtype=torch.float32)

    def predict(ids, count):
        with torch.no_grad():
            made = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=2)
        return made[0, len(ids) :].tolist()

    def logits(ids):
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].numpy()

    return predict, logits


def ours(lm, ids, count, policy):
    out = rj.generate(lm.params, lm.config, [ids], policy=policy, max_new_tokens=count)
    return np.asarray(out.tokens)[0, : int(out.lengths[0])].tolist()


@pytest.mark.slow
def test_it_finds_the_needle(lm):
    ids = lm.tokenizer(PROSE)["input_ids"]
    made = lm.tokenizer.decode(ours(lm, ids, 12, rj.RecycledAttention(64, rj.FixedStride(4))))
    assert scoring.score(made, ["4217350"], "all") == 1, made


def test_logits_and_greedy_tokens_equal_hugging_faces(lm, hf):
    predict, logits = hf
    ids = lm.tokenizer(PROSE)["input_ids"]
    expected = logits(ids)
    got = np.asarray(rj.forward(lm.params, lm.config, jnp.asarray([ids], jnp.int32)))[0]
    assert np.abs(got - expected).max() / np.abs(expected).max() < 1e-3
    assert ours(lm, ids, 12, rj.FullAttention()) == predict(ids, 12)


def same_up_to_a_tie(logits, ids, got, expected):
    """Whether the tokens are equal, or first differ where Hugging Face's logits are a near tie in float32."""
    if got == expected:
        return True
    at = next((at for at, pair in enumerate(zip(got, expected, strict=False)) if pair[0] != pair[1]), None)
    if at is None:
        return False
    row = logits([*ids, *expected[:at]])[-1]
    return abs(row[got[at]] - row[expected[at]]) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TASKS if not name.startswith("qa")])
def test_ruler_predictions_equal_hugging_faces(lm, hf, name):
    """Predictions for the same token ids, at 1024 tokens (2048 for tasks of long answers, of which the first 64 tokens are
    compared) under full attention."""
    predict, logits = hf
    drawn_on = Material(material.words(), material.essays(None)[0])
    length = 2048 if name in LONG_TASKS else 1024
    task = TASKS[name](name, drawn_on, cells.prompting(lm.tokenizer, "base"), length, 42)
    for index in range(2):
        ids = lm.tokenizer(task.sample(index).prompt)["input_ids"]
        count = min(task.new_tokens, 64 if name in LONG_TASKS else 128)
        assert same_up_to_a_tie(logits, ids, ours(lm, ids, count, rj.FullAttention()), predict(ids, count))
