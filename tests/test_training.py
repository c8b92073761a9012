"""The training step, its optimizer, and how both are sharded."""

import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT, environment
from jax.sharding import PartitionSpec

import recyc_jax as rj
from recyc_jax import sharding
from recyc_jax.attention import whole_sequence
from recyc_jax.attention.whole_sequence import Recycle
from train import forward, metrics, step
from train.optimizer import Optimizer, shardings

OPTIMIZER = Optimizer(0.01, "linear", 2, 10, 0.1, 1.0, "adamw")


def causal(q, k, v, segments):
    return whole_sequence.causal(q, k, v, segments)


def recycled(q, k, v, segments):
    return whole_sequence.recycled(q, k, v, Recycle(5, 4, 6, evict=True))


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
    # Adam's first step is the sign of the gradient, which is arbitrary for gradients near 0
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


def test_accumulation_weighs_parts_by_their_predicted_tokens(params, config):
    """Packed rows of many documents have fewer predicted tokens: the parts of a batch count unequally."""
    borders = jnp.asarray([[24, 24], [24, 24], [3, 9], [12, 13]])  # where the second and the third document begin
    places = jnp.arange(24)
    segments = 1 + (places >= borders[:, :1]).astype(jnp.int32) + (places >= borders[:, 1:]).astype(jnp.int32)
    state, batch = state_of(params, config), batch_of(config) | {"segments": segments}
    plain, expected = jax.jit(taker(config))(state, batch)
    other, numbers = jax.jit(taker(config, accumulate=2))(state, batch)
    assert float(expected["tokens"]) == float(numbers["tokens"]) == 4 * 23 - 4
    np.testing.assert_allclose(numbers["loss"], expected["loss"], rtol=1e-5)
    for mine, theirs in zip(jax.tree.leaves(other.optimizer), jax.tree.leaves(plain.optimizer), strict=True):
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


def test_only_matrices_decay(config):
    """With layers stacked, norms and biases have two dimensions too; the weight decay must leave them alone."""
    config = dataclasses.replace(config, qkv_bias=True)
    params = jax.tree.map(lambda leaf: leaf + 0.5, rj.init_params(config, jax.random.key(0)))
    taken = []
    for decay in (0.0, 0.5):
        optimizer = dataclasses.replace(OPTIMIZER, weight_decay=decay)
        step_ = jax.jit(taker(config, optimizer=optimizer))
        taken.append(step_(state_of(params, config, optimizer), batch_of(config))[0].params)
    for (path, plain), decayed in zip(jax.tree.leaves_with_path(taken[0]), jax.tree.leaves(taken[1]), strict=True):
        changed = bool((plain != decayed).any())
        assert changed == (path[-1].key in ("kernel", "embedding", "head")), jax.tree_util.keystr(path)


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
        rate = Optimizer(1.0, schedule, warmup, 10, 0, 0, "adamw").rate()
        return [round(float(rate(number)), 3) for number in range(11)]

    assert rates("linear", 2) == [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0]
    assert rates("constant", 4) == [0.25, 0.5, 0.75, 1.0] + [1.0] * 7
    assert rates("cosine", 0)[::5] == [1.0, 0.5, 0.0]


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
def test_training_learns(params, config, kind):
    optimizer = Optimizer(0.02, "constant", 0, 30, 0.0, 1.0, kind, moment_dtype="bfloat16")
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
    mesh = sharding.mesh(1, 1, 1, jax.devices()[:1])
    for (path, leaf), place in zip(leaves, jax.tree.leaves(shardings(shapes, mesh).optimizer), strict=True):
        assert leaf.size > 1 or not any(place.spec)
        assert "v_row" not in jax.tree_util.keystr(path) or not any(place.spec)
    kernel = shardings(shapes, mesh).params["layers"]["mlp"]["down_proj"]["kernel"]
    assert kernel.spec == PartitionSpec(None, sharding.HEADS, "fsdp")


def test_meshes_that_do_not_fit_are_refused(config):
    with pytest.raises(ValueError, match="needs 3 devices, there are"):
        sharding.mesh(3, 1, 1)
    with pytest.raises(ValueError, match="tensor=3 does not divide the model's num_key_value_heads of 2"):
        sharding.check_divides(config, 1, 3)
    with pytest.raises(ValueError, match="fsdp=3 does not divide the model's hidden_size of 32"):
        sharding.check_divides(config, 3, 1)


def test_any_mesh_gives_the_loss_of_one_device():
    """Runs `on_meshes` on eight simulated CPU devices, in a separate process."""
    env = environment("--xla_force_host_platform_device_count=8")
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
    assert "meshes: 2" in done.stdout


def on_meshes():
    config = rj.LlamaConfig.tiny(num_attention_heads=8, num_key_value_heads=4, qkv_bias=True)
    params = jax.tree.map(lambda leaf: 4 * leaf, rj.init_params(config, jax.random.key(0)))
    batch = batch_of(config, 16)
    _, expected = jax.jit(taker(config, recycled, accumulate=2))(state_of(params, config), batch)
    count = 0
    for data_, fsdp, tensor in [(2, 2, 2), (1, 2, 4)]:
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
            assert kernel.sharding.spec == PartitionSpec(None, "fsdp", sharding.HEADS)
            assert kernel.addressable_shards[0].data.shape == (2, 32 // fsdp, 64 // tensor)
            assert tree["embedding"].addressable_shards[0].data.shape == (96 // tensor, 32 // fsdp)
            assert tree["final_norm"]["scale"].sharding.is_fully_replicated
        count += 1
    print("meshes:", count)
