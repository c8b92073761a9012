"""Where arrays lie on a mesh of devices: one table from parameter names to axes.

Axes: `data` (rows of the batch, parameters copied), `fsdp` (rows of the batch, parameters split), `tensor` (heads,
feed-forward features and vocabulary split).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from recyc_jax.config import LlamaConfig

TENSOR = "tensor"
AXES = ("data", "fsdp", TENSOR)
ROWS = ("data", "fsdp")
"""The axes that a batch's rows are split over."""

# the end of a leaf's path, and how its last dimensions are split; leading ones (stacked layers) are whole
_TABLE: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embedding|head", ("tensor", "fsdp")),  # [V, D]
    (r"[qkv]_proj/kernel", ("fsdp", "tensor")),  # [D, N * H]
    (r"[qkv]_proj/bias", ("tensor",)),
    (r"o_proj/kernel", ("tensor", "fsdp")),  # [N * H, D]
    (r"(gate|up)_proj/kernel", ("fsdp", "tensor")),  # [D, F]
    (r"down_proj/kernel", ("tensor", "fsdp")),  # [F, D]
)


def mesh(data: int, fsdp: int, tensor: int, devices: Any = None) -> Mesh:
    """Devices as a mesh of these sizes; `devices` defaults to all. Raises ValueError where their number is another."""
    devices = jax.devices() if devices is None else devices
    if data * fsdp * tensor != len(devices):
        raise ValueError(
            f"a mesh of data {data} x fsdp {fsdp} x tensor {tensor} needs {data * fsdp * tensor} devices, "
            f"there are {len(devices)}"
        )
    # a tensor axis of 8 on a torus of 4 x 4 x 4 takes two of its axes, one in part
    grid = mesh_utils.create_device_mesh((data, fsdp, tensor), devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)


def check_divides(config: LlamaConfig, fsdp: int, tensor: int) -> None:
    """Raise ValueError, naming the dimension, where a parameter of this shape cannot be split so."""
    for name, size, axis, parts in (
        ("num_key_value_heads", config.num_key_value_heads, "tensor", tensor),
        ("intermediate_size", config.intermediate_size, "tensor", tensor),
        ("vocab_size", config.vocab_size, "tensor", tensor),
        ("hidden_size", config.hidden_size, "fsdp", fsdp),
    ):
        if size % parts:
            raise ValueError(f"{axis}={parts} does not divide the model's {name} of {size}")


def spec(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
    """The spec of the leaf at this path of a parameter tree, or of a tree that repeats it, such as Adam's moments."""
    name = "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
    if (
        re.search(r"v_row|v_col", name) or leaf.size == 1
    ):  # Adafactor's factored moments, which are small, and its placeholders
        return PartitionSpec()
    for pattern, split in _TABLE:
        if re.search(rf"(^|/)({pattern})$", name) and leaf.ndim >= len(split):
            return PartitionSpec(*[None] * (leaf.ndim - len(split)), *split)
    return PartitionSpec()


def by_letters(batch: int, on: Any) -> Callable[[str], PartitionSpec]:
    """Specs of arrays named by a letter a dimension: "B" rows (there are `batch`), "K" key/value heads, "-" neither.
    Rows that the mesh's axes do not divide are whole everywhere."""
    rows = tuple(axis for axis in ROWS if axis in on.axis_names)
    parts = math.prod(on.shape[axis] for axis in rows)
    names = {
        "B": rows if rows and batch % parts == 0 else None,
        "K": TENSOR if TENSOR in on.axis_names else None,
        "-": None,
    }
    return lambda letters: PartitionSpec(*(names[letter] for letter in letters))


def spread(array: Any, letters: str, batch: int) -> Any:
    """The array as `by_letters` has it on the mesh that is set (`jax.set_mesh`); itself where none is."""
    if unsplit():
        return array
    on = jax.sharding.get_abstract_mesh()
    if isinstance(array, Tracer):
        return jax.lax.with_sharding_constraint(array, by_letters(batch, on)(letters))
    return jax.device_put(array, NamedSharding(jax.sharding.get_mesh(), by_letters(batch, on)(letters)))


def unsplit() -> bool:
    """No mesh is set: arrays lie on one device."""
    return jax.sharding.get_abstract_mesh().empty


def split_kernel(function: Callable[..., Any], batch: int, inputs: tuple[Any, ...], outputs: Any) -> Callable[..., Any]:
    """The function on each device's share of heads and rows, where a mesh is set (`jax.set_mesh`): XLA cannot split a
    kernel. `inputs` and `outputs` give the letters of each argument and result, as `by_letters` has them."""
    if unsplit():
        return function
    on = jax.sharding.get_abstract_mesh()
    letters = by_letters(batch, on)
    out_specs = jax.tree.map(letters, outputs)
    return jax.shard_map(function, in_specs=tuple(map(letters, inputs)), out_specs=out_specs, check_vma=False)


def shardings(tree: Any, on: Mesh) -> Any:
    """A NamedSharding for each leaf (an array or its shape)."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: NamedSharding(on, spec(path, leaf)), tree)
