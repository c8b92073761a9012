"""Checkpoints that are verified on reading: a damaged one is reported, and the one before it is restored.

Orbax writes the files (asynchronously, each step to a folder that appears atomically). Each checkpoint also holds a
card: the run's settings, the position in the data, and a fingerprint of every leaf. Fingerprints are compared after
reading, because orbax restores flipped bits and changed dtypes without an error."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from train.card import Card

_DAMAGED = "damaged"


class Restored(NamedTuple):
    step: int
    state: Any
    card: Card


class NoUsableCheckpointError(ValueError):
    """There are checkpoints, but none of them can be read completely."""


class Checkpoints:
    """The checkpoints of a run, in `folder`/<step>."""

    def __init__(self, folder: Path, keep: int) -> None:
        import orbax.checkpoint as ocp

        logging.getLogger("absl").setLevel(logging.ERROR)  # orbax reports every stage of every save
        self._folder, self._keep, self._ocp = folder.resolve(), keep, ocp
        self._folder.mkdir(parents=True, exist_ok=True)
        self._link: tempfile.TemporaryDirectory[str] | None = None
        self._manager = self._open()

    def _open(self) -> Any:
        options = self._ocp.CheckpointManagerOptions(max_to_keep=self._keep, create=True, cleanup_tmp_directories=True)
        return self._ocp.CheckpointManager(self._plain_path(), options=options)

    def _plain_path(self) -> Path:
        """A path of the folder without the characters of patterns, as which orbax would read them: a link, if need
        be."""
        if not any(character in str(self._folder) for character in "[]*?"):
            return self._folder
        if self._link is None:
            self._link = tempfile.TemporaryDirectory(prefix="recyc_jax.")
            (Path(self._link.name) / "checkpoints").symlink_to(self._folder)
        return Path(self._link.name) / "checkpoints"

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, card: Mapping[str, Any]) -> bool:
        """Start saving `state` in the background. Returns False and writes nothing if the state holds numbers that are
        not finite."""
        prints, finite = fingerprints(state)
        if not finite:
            return False
        if step not in self.steps():
            args = self._ocp.args
            whole = dict(card) | {"fingerprints": prints}
            self._manager.save(
                step, args=args.Composite(state=args.StandardSave(state), card=args.JsonSave(whole)), force=True
            )
        return True

    def wait(self) -> None:
        """Wait until every save that was started is on disk."""
        self._manager.wait_until_finished()

    def latest_card(self) -> Card | None:
        """The card of the latest checkpoint whose card can be read; None if there is none."""
        args = self._ocp.args
        for step in reversed(self.steps()):
            with contextlib.suppress(Exception):  # `restore` reports damaged checkpoints
                return dict(self._manager.restore(step, args=args.Composite(card=args.JsonRestore()))["card"])
        return None

    def restore(self, like: Any) -> Restored | None:
        """The latest checkpoint that reads back as it was saved, with the shapes and shardings of `like`; None if there
        are no checkpoints.

        Damaged checkpoints are reported, skipped in favour of the one before, and moved to `damaged/` once an intact
        one is found. If none is intact, raises NoUsableCheckpointError and moves nothing: starting over is for a person
        to decide. Errors for lack of memory or permission are no sign of damage and are raised unchanged."""
        steps, damaged = self.steps(), []
        for step in reversed(steps):
            try:
                found = self._read(step, like)
            except (MemoryError, PermissionError):
                raise
            except Exception as error:  # orbax raises many types for damaged files
                if "RESOURCE_EXHAUSTED" in str(error):
                    raise
                self._report(step, error)
                damaged.append(step)
                continue
            if damaged:
                self._set_aside(damaged)
            return found
        if steps:
            raise NoUsableCheckpointError(
                f"{self._folder}: none of the checkpoints {', '.join(map(str, steps))} can be read whole; to begin anew, "
                "choose another --out"
            )
        return None

    def _read(self, step: int, like: Any) -> Restored:
        args = self._ocp.args
        found = self._manager.restore(
            step, args=args.Composite(state=args.StandardRestore(like), card=args.JsonRestore())
        )
        card = dict(found["card"])
        saved, (now, _) = card.pop("fingerprints"), fingerprints(found["state"])
        for name in saved | now:
            if saved.get(name) != now.get(name):
                raise ValueError(f"{name} is not what was saved ({now.get(name)}, saved as {saved.get(name)})")
        return Restored(step, found["state"], card)

    def _report(self, step: int, error: Exception) -> None:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        print(
            f"WARNING: checkpoint {self._folder / str(step)} is damaged and is passed over for the one before it: {reason}",
            file=sys.stderr,
            flush=True,
        )

    def _set_aside(self, steps: list[int]) -> None:
        """Move the checkpoints of these steps to `damaged/`, so that the steps can be saved again."""
        self._manager.close()
        if jax.process_index() == 0:
            (self._folder / _DAMAGED).mkdir(exist_ok=True)
            for step in steps:
                target, number = self._folder / _DAMAGED / str(step), 1
                while target.exists():
                    number += 1
                    target = target.with_name(f"{step}-{number}")
                (self._folder / str(step)).rename(target)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("set aside")
        self._manager = self._open()

    def close(self) -> None:
        self._manager.close()
        if self._link is not None:
            self._link.cleanup()


def fingerprints(tree: Any) -> tuple[dict[str, str], bool]:
    """By path, each leaf's dtype, shape and checksum; and whether all numbers are finite.

    Checksums are computed on the leaf's devices and do not depend on its sharding: the bits of each element are
    multiplied by an odd number derived from the element's index and summed modulo 2**32. Changing any one element
    changes the checksum.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    sums = jax.device_get([_checksum(leaf) for _, leaf in leaves])
    shapes = shapes_of(tree)
    prints = {name: f"{shapes[name]}{int(total):08x}" for name, (total, _) in zip(shapes, sums, strict=True)}
    return prints, all(bool(finite) for _, finite in sums)


def shapes_of(tree: Any) -> dict[str, str]:
    """By path, each leaf's dtype and shape in the form that its fingerprint starts with."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}:" for path, leaf in leaves}


@functools.partial(jax.jit)
def _checksum(leaf: Array) -> tuple[Array, Array]:
    finite = jnp.all(jnp.isfinite(leaf)) if jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.array(True)
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    kinds = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
    if leaf.dtype.itemsize not in kinds:
        raise TypeError(f"a leaf of {leaf.dtype} has no checksum")
    bits = lax.bitcast_convert_type(leaf, kinds[leaf.dtype.itemsize]).astype(jnp.uint32)
    weight = jnp.ones(leaf.shape, jnp.uint32)
    for axis in range(leaf.ndim):
        place = lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        weight = (weight ^ (place + jnp.uint32(1))) * jnp.uint32(0x9E3779B1)
        weight = weight ^ (weight >> jnp.uint32(15))
    return jnp.sum(bits * (weight | jnp.uint32(1)), dtype=jnp.uint32), finite
