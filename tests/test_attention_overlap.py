"""What the probe records, and `python -m eval.attention_overlap` as users run it."""

import json

import checkpoints
import numpy as np
import pytest

import recyc_jax as rj
from eval.attention_overlap.probe import Probe

SETS = (rj.SnapKV(6, pool=3), rj.SnapKV(6, pool=1, lookahead=4), rj.StreamingLLM(6, sinks=2))


@pytest.fixture(scope="module")
def followed(params, config):
    tokens = np.random.default_rng(0).integers(0, 96, (3, 44))

    def follow(*candidates):
        probe = Probe(candidates, 13)
        state = rj.prefill(params, config, tokens[:, :30], policies=(probe,), max_new_tokens=14)
        scores, _ = rj.score_after(params, config, state, tokens[:, 30:], policy=probe)
        return np.stack([layer.covered for layer in scores.states], axis=1), scores

    return tokens, follow


def test_the_probe_is_full_attention(followed, params, config):
    tokens, follow = followed
    _, scores = follow(*SETS)
    expected = rj.score(params, config, tokens, policy=rj.FullAttention(), context_length=30)
    np.testing.assert_allclose(scores.log_probabilities, expected, atol=1e-5)
    assert (np.asarray(scores.full_steps) == 13).all()


def test_no_set_covers_more_than_the_best(followed):
    covered, _ = followed[1](*SETS)
    assert covered.shape == (3, 2, 13, 4)  # rows, layers, steps, sets
    assert (covered > 0).all()
    assert (covered[..., :-1] <= covered[..., -1:] + 1e-5).all()
    assert (covered[..., -1] < 1).all()
    assert len({round(float(covered[..., place].mean()), 4) for place in range(4)}) == 4


def test_a_set_of_everything_covers_everything(followed):
    covered, _ = followed[1](rj.SnapKV(44), rj.StreamingLLM(44))
    np.testing.assert_allclose(covered, 1, atol=1e-5)


def test_a_set_covers_what_attention_to_it_alone_would_see(followed, params, config):
    """In layer 0 of the first step, full attention and StreamingLLM have the same inputs, so StreamingLLM's share is
    the probability of its slots in the numpy oracle."""
    import oracle

    tokens, follow = followed
    covered, _ = follow(rj.StreamingLLM(6, sinks=2))
    for row in range(3):
        decoder = oracle.Decoder(params, config)
        for token in tokens[row, :31].tolist():
            decoder.feed(token, lambda layer, head: None)
        kept = [0, 1, *range(27, 31)]
        share = np.mean([np.exp(chances[:, kept]).sum(axis=1).mean() for chances in decoder.all_chances[0]])
        assert covered[row, 0, 0, 0] == pytest.approx(share, abs=1e-5)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    checkpoints.write_folder(folder)
    (folder / "prose.txt").write_text(checkpoints.TEXT * 30)
    return folder


def test_the_command(model, call_module, tmp_path):
    flags = ["--model", model, "--sources", f"prose={model}/prose.txt", "--length", 120, "--new-tokens", 24]
    flags += ["--sequences", 3, "--batch-size", 2, "--out", tmp_path, "--schedules"]
    done = call_module("eval.attention_overlap", *flags, "recycled:budget=0.125,check_every=4,threshold=0.3")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "overlap.json").read_text())
    (covered,) = found["covered"].values()
    assert list(covered)[-1] == "best set of the step"
    for by_layer in covered.values():
        assert np.shape(by_layer) == (2, 23)
        assert 0 < np.min(by_layer) <= np.max(by_layer) <= 1.0001
    ((strides,),) = (by_source.values() for by_source in found["effective_strides"].values())
    assert len(strides) == 2
    assert all(stride is None or stride >= 4 for stride in strides)
    for figure in ("overlap.png", "overlap_layers.png", "strides.png"):
        assert (tmp_path / figure).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--sets", "h2o:budget=9"), "--sets h2o:budget=9: only snapkv and streaming_llm"),
        (("--sets", "snapkv:budget=9", "snapkv:budget=8"), "all of the same budget"),
        (("--schedules", "recycled:budget=9,stride=5"), "with check_every and threshold"),
        (("--new-tokens", "1024"), "leaves no prompt"),
        (("--sources", "ruler:nothing"), "'nothing' is unknown"),
    ],
)
def test_bad_flags_end_in_one_line(model, call_module, tmp_path, flags, message):
    done = call_module("eval.attention_overlap", "--model", model, "--out", tmp_path / "out", *flags)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_model_of_sliding_windows_alone_is_refused(call_module, tmp_path):
    checkpoints.write_folder(tmp_path / "model", family="phi3")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"sliding_window": 16}))
    ran = call_module("eval.attention_overlap", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"))
    assert ran.returncode == 2
    assert "every layer has a sliding window" in ran.stderr.strip().splitlines()[-1]
