"""Checkpoints: fingerprints, and damage that orbax does not report."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.checkpoint import Checkpoints, NoUsableCheckpointError, fingerprints


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


# if one read fails, orbax does not await the others; Python warns whenever it collects them
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_orbax_restores_without_a_word_is_found_out(tmp_path):
    """The state of the later checkpoint does not match the fingerprints of its card, as after a flipped bit."""
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
    again.save(2, state, {"step": 2})  # the step can be saved again
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


# if one read fails, orbax does not await the others; Python warns whenever it collects them
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
