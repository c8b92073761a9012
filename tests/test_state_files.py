"""States on disk: what is loaded goes on as what was saved, and nothing else is taken."""

import json
import multiprocessing
import os
import signal
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_strings import NEW, RAGGED, STRINGS, every_policy, same

import recyc_jax as rj
from recyc_jax import state_files


@every_policy
def test_a_loaded_state_goes_on(params, config, policy, tmp_path):
    """At the prompts, in the middle of an answer (and of a period), and with a turn after it."""
    state = rj.prefill(params, config, RAGGED, policies=policy, max_new_tokens=NEW)
    state.save(tmp_path / "prompts")
    whole, state = rj.decode(params, config, state, policy=policy)
    part, state = rj.decode(params, config, state, policy=policy, max_new_tokens=6, rewind=False)
    state.save(tmp_path / "answer")
    rest, state = rj.decode(params, config, state, policy=policy, max_new_tokens=5, rewind=False)
    state = rj.extend(params, config, state, [[7, 8], [1], [2, 3, 4], [5]], max_new_tokens=4)
    further, _ = rj.decode(params, config, state, policy=policy)

    loaded = rj.load_state(tmp_path / "prompts", params, config)
    same(whole, rj.decode(params, config, loaded, policy=policy)[0])
    loaded = rj.load_state(tmp_path / "answer", params, config)
    again, loaded = rj.decode(params, config, loaded, policy=policy, max_new_tokens=5, rewind=False)
    same(rest, again)
    loaded = rj.extend(params, config, loaded, [[7, 8], [1], [2, 3, 4], [5]], max_new_tokens=4)
    same(further, rj.decode(params, config, loaded, policy=policy)[0])
    loaded = rj.rewind(rj.load_state(tmp_path / "answer", params, config))
    same(whole, rj.decode(params, config, loaded, policy=policy)[0])
    np.testing.assert_array_equal(np.concatenate([part.tokens, rest.tokens], axis=1), whole.tokens[:, :11])


@pytest.fixture(scope="module")
def windowed():
    config = rj.LlamaConfig.from_hf(
        dict(
            model_type="gemma3_text", vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=512, rms_norm_eps=1e-6,
            rope_theta=1e6, rope_local_base_freq=1e4, sliding_window=8, sliding_window_pattern=3,
            query_pre_attn_scalar=16, eos_token_id=1, tie_word_embeddings=True,
        )
    )  # fmt: skip
    return rj.init_params(config, jax.random.key(0)), config


@settings(max_examples=8, deadline=None)
@given(
    text=st.sampled_from(STRINGS),
    rings=st.booleans(),
    steps=st.lists(st.sampled_from(("decode", "extend", "save", "rewind", "branch")), min_size=2, max_size=6),
    seed=st.integers(0, 99),
)
def test_any_path_is_the_straight_one(params, config, windowed, tmp_path_factory, text, rings, steps, seed):
    """States that are saved, loaded and branched on the way give the tokens of those that are not."""
    policy, rng = rj.parse_policy(text), np.random.default_rng(seed)
    if rings:
        params, config = windowed
    folder = tmp_path_factory.mktemp("states") / "state"
    prompts = [rng.integers(2, 96, n).tolist() for n in (3, 11)]
    sampling = rj.chain(rj.RepetitionPenalty(1.3), rj.Sample(0.9))
    options = dict(policy=policy, sampling=sampling, key=jax.random.key(seed), eos_ids=())

    def begun():
        return rj.prefill(params, config, prompts, policies=policy, max_new_tokens=40)

    straight, wound = begun(), begun()
    for step in [*steps, "decode"]:
        if step == "save":
            wound.save(folder)
            wound = rj.load_state(folder, params, config)
        elif step == "rewind":
            straight, wound = rj.rewind(straight), rj.rewind(wound)
        elif step == "branch" and wound.answer is None:
            mark = rj.bookmark(wound)
            wound = rj.extend(params, config, wound, [[9, 8, 7], [6]], max_new_tokens=40)
            _, wound = rj.decode(params, config, wound, max_new_tokens=3, rewind=False, **options)
            wound = rj.rewind(wound, to=mark)
        elif step == "extend":
            turn = [rng.integers(2, 96, n).tolist() for n in (5, 2)]
            straight, wound = (rj.extend(params, config, one, turn, max_new_tokens=40) for one in (straight, wound))
        elif step == "decode":
            one, straight = rj.decode(params, config, straight, max_new_tokens=5, rewind=False, **options)
            other, wound = rj.decode(params, config, wound, max_new_tokens=5, rewind=False, **options)
            same(one, other)
            np.testing.assert_array_equal(straight.seen, wound.seen)


def test_a_state_knows_its_tokens(params, config):
    """`seen` is that of the whole text, answers included, and what is dropped or rewound is not in it."""
    full = rj.FullAttention()
    state = rj.prefill(params, config, [[5, 9], [3]], policies=full, max_new_tokens=9)
    out, state = rj.decode(params, config, state, policy=full, max_new_tokens=6, eos_ids=(), rewind=False)
    texts = [[5, 9, *out.tokens[0].tolist()], [3, *out.tokens[1].tolist()]]

    def seen():
        return [set(np.flatnonzero(row).tolist()) for row in np.asarray(state.seen)]

    assert seen() == list(map(set, texts))
    texts = [[*texts[0][:4], 77], [*texts[1][:3], 78, 79]]
    state = rj.extend(params, config, state, [[77], [78, 79]], keep=[4, 3])
    assert seen() == list(map(set, texts))
    mark = rj.bookmark(state)
    out, state = rj.decode(params, config, state, policy=full, max_new_tokens=3, eos_ids=(), rewind=False)
    assert seen() == [set(text + row) for text, row in zip(texts, out.tokens.tolist(), strict=True)]
    state = rj.rewind(state, to=mark)
    assert seen() == list(map(set, texts))


def test_another_model_is_refused(params, config, tmp_path):
    state = rj.prefill(params, config, [[5, 9, 3]], policies="full")
    state.save(tmp_path / "s", who="I")
    card = state_files.read_card(tmp_path / "s")
    assert card["tokens"] == [3]
    assert card["notes"] == {"who": "I"}
    other = jax.tree.map(lambda leaf: leaf, params)
    other["embedding"] = other["embedding"].at[-1, -1].add(1e-3)
    with pytest.raises(ValueError, match=f"another model .*{card['model']['fingerprint']}"):
        rj.load_state(tmp_path / "s", other, config)
    with pytest.raises(ValueError, match="another model"):
        rj.load_state(tmp_path / "s", jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params), config)
    swapped = jax.tree.map(lambda leaf: leaf, params)
    swapped["embedding"] = swapped["embedding"][::-1]
    assert state_files.described(swapped, config) != state_files.described(params, config)


@pytest.mark.parametrize(
    "damage", ["shortened", "flipped", "zeroed", "missing", "card", "no card", "format", "empty", "class"]
)
def test_a_torn_file_is_noticed(params, config, tmp_path, damage):
    rj.prefill(params, config, [[5, 9, 3]], policies="full").save(tmp_path)
    (file,), card = tmp_path.glob("*.safetensors"), tmp_path / "card.json"
    data, text = file.read_bytes(), card.read_text()
    if damage == "shortened":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        file.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    elif damage == "zeroed":
        file.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    elif damage == "missing":
        file.unlink()
    elif damage == "card":
        card.write_text(text[: len(text) // 2])
    elif damage == "no card":
        card.unlink()
    elif damage == "format":
        card.write_text(text.replace('"format": 1', '"format": 7'))
    elif damage == "empty":
        told = json.loads(text)
        told["tree"]["fields"]["cache"] = {}
        card.write_text(json.dumps(told))
    else:
        card.write_text(text.replace("recyc_jax.cache:KVCache", "subprocess:Popen"))
    with pytest.raises(ValueError, match=r"safetensors|card\.json"):
        rj.load_state(tmp_path, params, config)


def test_a_folder_is_whole_before_and_after(params, config, tmp_path, monkeypatch):
    """A save that fails leaves the earlier state; one that succeeds leaves one file of arrays; other folders are safe."""
    state = rj.prefill(params, config, [[5, 9, 3]], policies="full")
    state.save(tmp_path / "s")
    before = {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(state_files.Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(OSError, match="No space left"):
            rj.prefill(params, config, [[1]], policies="full").save(tmp_path / "s")
    assert {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()} == before
    rj.prefill(params, config, [[1]], policies="full").save(tmp_path / "s")
    assert len(list((tmp_path / "s").iterdir())) == 2
    assert int(rj.load_state(tmp_path / "s", params, config).row_lengths[0]) == 65
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="something else"):
        state.save(tmp_path / "mine")
    rj.decode(params, config, state, policy="full")
    with pytest.raises(ValueError, match="donated"):
        state.save(tmp_path / "s")


def _save_forever(folder, params, config, ready):
    params = jax.tree.map(jnp.asarray, params)
    state = rj.prefill(params, config, [[5, 9, 3] * 40], policies="full")
    state.save(folder)
    ready.set()
    while True:
        state.save(folder)


@pytest.mark.slow
def test_a_killed_save_leaves_a_state(params, config, tmp_path):
    context = multiprocessing.get_context("spawn")
    for wait in (0.0, 0.003, 0.01, 0.02):
        ready = context.Event()
        process = context.Process(
            target=_save_forever, args=(tmp_path / "s", jax.device_get(params), config, ready), daemon=True
        )
        process.start()
        assert ready.wait(120)
        process.join(0.05 + wait)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        rj.load_state(tmp_path / "s", params, config)


@flax.struct.dataclass
class Mine:
    steps: Any


class OfMine(rj.FullAttention):
    def start(self, attention, prompt, caches):
        return (Mine(jnp.zeros(1)),) * len(prompt)

    def partial_step(self, attention, step, state):
        return super().partial_step(attention, step, None)._replace(state=state)


def test_what_cannot_be_saved_says_so(params, config, tmp_path):
    state = rj.prefill(params, config, [[5, 9, 3]], policies="full")
    _, state = rj.decode(params, config, state, policy=OfMine(), max_new_tokens=3, rewind=False)
    with pytest.raises(ValueError, match="rewind"):
        state.save(tmp_path / "s")
    assert not (tmp_path / "s").exists()
    rj.rewind(state).save(tmp_path / "s")
    inside = jax.jit(lambda p: rj.prefill(p, config, np.asarray([[5, 9, 3]]), policies="full"))(params)
    with pytest.raises(ValueError, match="pass params"):
        inside.save(tmp_path / "s")
    inside.save(tmp_path / "s", params, config)
    mine = jax.tree.map(lambda leaf: leaf + 0, params)
    state = rj.prefill(mine, config, [[5]], policies="full")
    del mine
    with pytest.raises(ValueError, match="gone"):
        state.save(tmp_path / "s")


def test_the_card_names_what_is_there(params, config, tmp_path):
    policy = "lookahead:budget=5,stride=4"
    state = rj.prefill(params, config, RAGGED, policies=[policy, "h2o:budget=6"], max_new_tokens=NEW)
    _, state = rj.decode(params, config, state, policy=policy, max_new_tokens=3, rewind=False)
    state.save(tmp_path)
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["policy"] == policy
    assert card["tokens"] == [len(row) + 2 for row in RAGGED]
    assert card["statistics"] == {"windows": [32], "query": True, "mass": True}
