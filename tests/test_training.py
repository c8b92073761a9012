"""Data, optimizer, step, sharding and checkpoints of training, each by itself."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

import recyc_jax as rj
from recyc_jax import sharding
from recyc_jax.attention import training
from recyc_jax.attention.training import Recycle
from train import data, forward, metrics, step
from train.checkpoint import Checkpoints, NoUsableCheckpointError, fingerprints

ROOT = Path(__file__).parent.parent
OPTIMIZER = step.Optimizer(0.01, "linear", 2, 10, 0.1, 1.0, "adamw")


# --- data ------------------------------------------------------------------------------------------------------------


def corpus_of(lengths, domains=None):
    bounds = np.cumsum([0, *lengths])
    names = tuple(f"document {number}" for number in range(len(lengths)))
    return data.Corpus(
        np.arange(bounds[-1], dtype=np.uint32), bounds, tuple(domains or ["a"] * len(lengths)), names, "print"
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.integers(1, 20), st.integers(0, 5))
def test_packed_rows_hold_every_token_once_in_its_document(lengths, width, seed):
    corpus = corpus_of(lengths)
    rows = data.Packed(corpus, range(len(lengths)), width, seed)
    assert len(rows) == sum(lengths) // width
    seen = []
    for number in range(len(rows)):
        row = rows[number]
        seen += list(row["tokens"])
        owner = np.searchsorted(corpus.bounds, row["tokens"], side="right")
        # one segment where and only where it is one document
        np.testing.assert_array_equal(np.diff(row["segments"]) == 0, np.diff(owner) == 0)
    assert len(set(seen)) == len(seen) == len(rows) * width


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.integers(1, 20))
def test_windows_lie_within_a_document_and_do_not_overlap(lengths, width):
    corpus = corpus_of(lengths)
    rows = data.Windows(corpus, range(len(lengths)), width)
    assert len(rows) == sum(length // width for length in lengths)
    tokens = [rows[number]["tokens"] for number in range(len(rows))]
    for row, document in zip(tokens, rows.documents, strict=True):
        assert set(row) <= set(corpus.document(document))
    assert len({token for row in tokens for token in row}) == len(rows) * width


def test_an_epoch_takes_every_row_once_and_goes_on_exactly():
    rows = data.Windows(corpus_of([70]), [0], 7)
    taken = data.batches(rows, 4, seed=3)
    first = [next(taken)["tokens"] for _ in range(5)]  # two epochs of ten rows
    starts = [row[0] for batch in first for row in batch]
    assert sorted(starts[:10]) == sorted(starts[10:]) == list(range(0, 70, 7))
    assert starts[:10] != starts[10:]
    state = json.loads(json.dumps(taken.get_state()))
    rest = [next(taken)["tokens"] for _ in range(3)]
    again = data.batches(rows, 4, seed=3)
    again.set_state(state)
    for expected in rest:
        np.testing.assert_array_equal(next(again)["tokens"], expected)


def test_whole_documents_of_each_domain_are_held_out():
    corpus = corpus_of([100, 10, 80, 90, 50, 60], ["a", "a", "a", "a", "b", "b"])
    kept, held = data.hold_out(corpus, 0.3, 40, seed=0)
    assert sorted(kept + held) == list(range(6))
    of_a = [number for number in held if number < 4]
    assert corpus.lengths[of_a].sum() >= 0.3 * 280
    assert 1 not in held
    assert len([number for number in held if number > 3]) == 1
    assert data.hold_out(corpus, 0, 40, seed=0) == (list(range(6)), [])
    with pytest.raises(ValueError, match=r"--data b: holding documents out .* one of at least 70 tokens"):
        data.hold_out(corpus, 0.3, 70, seed=0)


# --- the step --------------------------------------------------------------------------------------------------------


def causal(q, k, v, segments):
    return training.causal(q, k, v, segments)


def recycled(q, k, v, segments):
    return training.recycled(q, k, v, Recycle(5, 4, 6, evict=True))


def one_device():
    return sharding.mesh(1, 1, 1, jax.devices()[:1])


def taker(config, attend=causal, mesh=None, accumulate=1, optimizer=OPTIMIZER, **more):
    mesh = mesh or one_device()
    settings_ = dict(compute_dtype=jnp.float32, remat="full", z_loss=0.0) | more
    return functools.partial(
        step.train_step,
        config=config,
        optimizer=optimizer,
        attention=step.attention_over(mesh, attend),
        mesh=mesh,
        accumulate=accumulate,
        **settings_,
    )


def state_of(params, config, optimizer=OPTIMIZER):
    return step.start(forward.stack_layers(params, config.num_hidden_layers), optimizer)


def batch_of(config, rows=4, width=24):
    return {"tokens": jax.random.randint(jax.random.key(1), (rows, width), 0, config.vocab_size, jnp.int32)}


def test_a_step_is_adamw_on_the_mean_loss(params, config):
    batch = batch_of(config)

    def mean_loss(params):
        chances = jax.nn.log_softmax(rj.forward(params, config, batch["tokens"]))
        return -jnp.mean(jnp.take_along_axis(chances[:, :-1], batch["tokens"][:, 1:, None], axis=2))

    loss, grads = jax.value_and_grad(mean_loss)(params)
    tx = OPTIMIZER.make()
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = tx.update(grads, tx.init(params), params)
    expected = optax.apply_updates(params, updates)
    state, numbers = jax.jit(taker(config))(state_of(params, config), batch)
    np.testing.assert_allclose(numbers["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(
        numbers["grad_norm"], np.sqrt(sum(float(jnp.sum(grad**2)) for grad in jax.tree.leaves(grads))), rtol=1e-4
    )
    got = forward.unstack_layers(state.params)
    # Adam's first step is the gradient's sign: where a gradient is near nothing the sign is chance
    sure = jax.tree.map(lambda grad: jnp.abs(grad) > 1e-6, grads)
    jax.tree.map(lambda a, b, s: np.testing.assert_allclose(a[s], b[s], atol=1e-4), got, expected, sure)
    assert int(state.step) == 1


@pytest.mark.parametrize("attend", [causal, recycled])
@pytest.mark.parametrize(("accumulate", "remat"), [(4, "dots"), (1, "none")])
def test_how_a_step_is_worked_on_changes_nothing(params, config, attend, accumulate, remat):
    state, batch = state_of(params, config), batch_of(config)
    plain, expected = jax.jit(taker(config, attend))(state, batch)
    other, numbers = jax.jit(taker(config, attend, accumulate=accumulate, remat=remat))(state, batch)
    np.testing.assert_allclose(numbers["loss"], expected["loss"], rtol=1e-5)
    np.testing.assert_allclose(numbers["grad_norm"], expected["grad_norm"], rtol=1e-4)
    moments = zip(jax.tree.leaves(other.optimizer), jax.tree.leaves(plain.optimizer), strict=True)
    for mine, theirs in moments:
        np.testing.assert_allclose(mine, theirs, atol=1e-6)


def test_a_border_between_documents_is_not_predicted_across(params, config):
    tokens = batch_of(config, 1)["tokens"]
    segments = jnp.asarray([[1] * 10 + [2] * 14], jnp.int32)
    _, whole = jax.jit(taker(config))(state_of(params, config), {"tokens": tokens, "segments": segments})
    parts = [
        jax.jit(taker(config))(state_of(params, config), {"tokens": part})[1]
        for part in (tokens[:, :10], tokens[:, 10:])
    ]
    assert float(whole["tokens"]) == 22
    together = sum(float(part["loss"] * part["tokens"]) for part in parts) / 22
    np.testing.assert_allclose(whole["loss"], together, rtol=1e-5)


def test_an_update_that_is_not_finite_is_left_out_and_counted(params, config):
    state, batch = state_of(params, config), batch_of(config)
    taken = jax.jit(taker(config))
    broken = dataclasses.replace(
        state, params=state.params | {"embedding": state.params["embedding"].at[0, 0].set(jnp.inf)}
    )
    after, numbers = taken(broken, {"tokens": batch["tokens"].at[0, 0].set(0)})
    assert not bool(numbers["finite"])
    jax.tree.map(np.testing.assert_array_equal, after.params, broken.params)
    jax.tree.map(np.testing.assert_array_equal, after.optimizer, broken.optimizer)
    assert (int(after.step), int(after.skipped), int(after.skipped_in_row)) == (1, 1, 1)
    mended, _ = taken(dataclasses.replace(after, params=state.params), batch)
    assert (int(mended.step), int(mended.skipped), int(mended.skipped_in_row)) == (2, 1, 0)


def test_the_z_loss_is_added(params, config):
    state, batch = state_of(params, config), batch_of(config)
    _, plain = jax.jit(taker(config))(state, batch)
    _, with_z = jax.jit(taker(config, z_loss=0.1))(state, batch)
    normalisers = jax.nn.logsumexp(rj.forward(params, config, batch["tokens"])[:, :-1], axis=-1)
    np.testing.assert_allclose(with_z["loss"] - plain["loss"], 0.1 * jnp.mean(normalisers**2), rtol=1e-3)


def test_learning_rates():
    def rates(schedule, warmup):
        rate = step.Optimizer(1.0, schedule, warmup, 10, 0, 0, "adamw").rate()
        return [round(float(rate(number)), 3) for number in range(11)]

    assert rates("linear", 2) == [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0]
    assert rates("constant", 4) == [0.25, 0.5, 0.75, 1.0] + [1.0] * 7
    assert rates("cosine", 0)[::5] == [1.0, 0.5, 0.0]


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
def test_training_learns(params, config, kind):
    optimizer = step.Optimizer(0.02, "constant", 0, 30, 0.0, 1.0, kind, moment_dtype="bfloat16")
    state, batch = state_of(params, config, optimizer), batch_of(config)
    taken = jax.jit(taker(config, recycled, optimizer=optimizer))
    losses = []
    for _ in range(30):
        state, numbers = taken(state, batch)
        losses.append(float(numbers["loss"]))
    assert losses[-1] < 0.7 * losses[0]


def test_operations_are_counted_as_six_a_parameter_and_token():
    config = rj.LlamaConfig.tiny(tie_word_embeddings=True)
    count = sum(
        leaf.size
        for leaf in jax.tree.leaves(jax.eval_shape(lambda: rj.init_params(config, jax.random.key(0))))
        if leaf.ndim > 1
    )
    assert metrics.model_flops(config, 0, 10) == 60 * count
    assert metrics.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert metrics.peak_flops("cpu") is None


# --- sharding --------------------------------------------------------------------------------------------------------


def test_every_matrix_has_a_place_in_the_table(config):
    shapes = jax.eval_shape(
        lambda: state_of(rj.init_params(dataclasses.replace(config, qkv_bias=True), jax.random.key(0)), config)
    )
    leaves, _ = jax.tree_util.tree_flatten_with_path(shapes)
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path)
        split = any(sharding.spec(path, leaf))
        assert split == any(part in name for part in ("kernel", "embedding", "head", "bias")), name


def test_adafactors_factored_moments_are_whole_on_every_device(config):
    optimizer = dataclasses.replace(OPTIMIZER, kind="adafactor", weight_decay=0)
    wide = dataclasses.replace(config, hidden_size=256, num_attention_heads=32, num_key_value_heads=32, qkv_bias=True)
    shapes = jax.eval_shape(lambda: state_of(rj.init_params(wide, jax.random.key(0)), wide, optimizer))
    leaves, _ = jax.tree_util.tree_flatten_with_path(shapes.optimizer)
    factored = [(path, leaf) for path, leaf in leaves if "v_row" in jax.tree_util.keystr(path) and leaf.size > 1]
    assert factored
    for path, leaf in leaves:
        split = sharding.spec(path, leaf)
        assert leaf.size > 1 or not any(split)
        assert "v_row" not in jax.tree_util.keystr(path) or not any(split)


def test_meshes_that_do_not_fit_are_refused(config):
    with pytest.raises(ValueError, match="needs 3 devices, there are"):
        sharding.mesh(3, 1, 1)
    with pytest.raises(ValueError, match="tensor=3 does not divide the model's num_key_value_heads of 2"):
        sharding.check_divides(config, 1, 3)
    with pytest.raises(ValueError, match="fsdp=3 does not divide the model's hidden_size of 32"):
        sharding.check_divides(config, 3, 1)


def test_any_mesh_gives_the_loss_of_one_device():
    """On eight fake CPU devices, in a process of its own: see `on_meshes`."""
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    }
    done = subprocess.run(
        [sys.executable, "-c", "import test_training; test_training.on_meshes()"],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "meshes: 4" in done.stdout


def on_meshes():
    config = rj.LlamaConfig.tiny(num_attention_heads=8, num_key_value_heads=4, qkv_bias=True)
    params = jax.tree.map(lambda leaf: 4 * leaf, rj.init_params(config, jax.random.key(0)))
    batch = batch_of(config, 16)
    _, expected = jax.jit(taker(config, recycled, accumulate=2))(state_of(params, config), batch)
    count = 0
    for data_, fsdp, tensor in [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)]:
        mesh = sharding.mesh(data_, fsdp, tensor)
        initial = state_of(params, config)
        places = sharding.shardings(initial, mesh)
        state = jax.device_put(initial, places)
        rows = jax.device_put(batch, jax.sharding.NamedSharding(mesh, PartitionSpec(sharding.ROWS)))
        whole = jax.sharding.NamedSharding(mesh, PartitionSpec())
        taken = jax.jit(taker(config, recycled, mesh, accumulate=2), out_shardings=(places, whole))
        state, numbers = taken(state, rows)
        np.testing.assert_allclose(numbers["loss"], expected["loss"], rtol=1e-5)
        np.testing.assert_allclose(numbers["grad_norm"], expected["grad_norm"], rtol=1e-3)
        for tree in (state.params, state.optimizer[1][0].mu):
            kernel = tree["layers"]["attention"]["q_proj"]["kernel"]
            assert kernel.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
            assert kernel.addressable_shards[0].data.shape == (2, 32 // fsdp, 64 // tensor)
            assert tree["embedding"].addressable_shards[0].data.shape == (96 // tensor, 32 // fsdp)
            assert tree["final_norm"]["scale"].sharding.is_fully_replicated
        count += 1
    print("meshes:", count)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def small_state():
    return {
        "w": jnp.arange(6000.0).reshape(60, 100),
        "half": jnp.ones((7,), jnp.bfloat16),
        "n": jnp.zeros((), jnp.int32),
    }


def like(state):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 5999), st.integers(0, 31))
def test_any_flipped_bit_changes_the_fingerprint(place, bit):
    state = small_state()
    bits = np.asarray(state["w"]).view(np.uint32).copy()
    bits.reshape(-1)[place] ^= np.uint32(1 << bit)
    changed = state | {"w": jnp.asarray(bits.view(np.float32))}
    before, after = fingerprints(state)[0], fingerprints(changed)[0]
    assert [name for name in before if before[name] != after[name]] == ["['w']"]


def test_exchanged_elements_and_dtypes_change_the_fingerprint():
    state = small_state()
    exchanged = state["w"].at[0, 1].set(state["w"][1, 0]).at[1, 0].set(state["w"][0, 1])
    assert fingerprints(state)[0] != fingerprints(state | {"w": exchanged})[0]
    assert fingerprints(state)[0] != fingerprints(state | {"half": state["half"].astype(jnp.float32)})[0]
    assert fingerprints(state)[0] == fingerprints(jax.tree.map(jnp.copy, state))[0]


# orbax leaves the reads of the other leaves unawaited where one fails; when they are collected is chance
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_orbax_restores_without_a_word_is_found_out(tmp_path):
    """A later checkpoint whose numbers are not those that its card tells of, as after a flipped bit."""
    state = small_state()
    kept = Checkpoints(tmp_path / "kept", 3)
    kept.save(1, state, {"step": 1})
    kept.save(2, state, {"step": 2})
    kept.wait()
    kept.close()
    other = Checkpoints(tmp_path / "other", 3)
    other.save(2, state | {"w": state["w"].at[3, 3].add(1)}, {"step": 2})
    other.wait()
    other.close()
    import shutil

    shutil.rmtree(tmp_path / "kept" / "2" / "state")
    shutil.copytree(tmp_path / "other" / "2" / "state", tmp_path / "kept" / "2" / "state")
    again = Checkpoints(tmp_path / "kept", 3)
    restored = again.restore(like(state))
    assert restored.step == 1
    jax.tree.map(np.testing.assert_array_equal, restored.state, state)
    assert (tmp_path / "kept" / "damaged" / "2").is_dir()
    again.save(2, state, {"step": 2})  # the place is free again
    again.wait()
    assert again.steps() == [1, 2]
    again.close()


def test_states_that_are_not_finite_are_not_saved(tmp_path):
    kept = Checkpoints(tmp_path / "kept", 3)
    assert not kept.save(1, small_state() | {"half": jnp.full((7,), jnp.nan, jnp.bfloat16)}, {})
    kept.wait()
    assert kept.steps() == []
    assert kept.restore(like(small_state())) is None
    kept.close()


# orbax leaves the reads of the other leaves unawaited where one fails; when they are collected is chance
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_no_usable_checkpoint_is_an_error_not_a_new_beginning(tmp_path):
    state = small_state()
    kept = Checkpoints(tmp_path / "kept", 3)
    kept.save(5, state, {})
    kept.wait()
    for file in (tmp_path / "kept" / "5" / "state").rglob("d/*"):
        file.write_bytes(b"")
    with pytest.raises(NoUsableCheckpointError, match="none of the checkpoints 5 can be read whole"):
        kept.restore(like(state))
    kept.close()
