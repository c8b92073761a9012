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

# the end of a leaf's path, and the mesh axes that its last dimensions are split over; leading dimensions (stacked
# layers) are not split
_TABLE: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embedding|head", ("tensor", "fsdp")),  # [V, D]
    (r"[qkv]_proj/kernel", ("fsdp", "tensor")),  # [D, N * H]
    (r"[qkv]_proj/bias", ("tensor",)),
    (r"o_proj/kernel", ("tensor", "fsdp")),  # [N * H, D]
    (r"(gate|up)_proj/kernel", ("fsdp", "tensor")),  # [D, F]
    (r"down_proj/kernel", ("tensor", "fsdp")),  # [F, D]
)


def mesh(data: int, fsdp: int, tensor: int, devices: Any = None) -> Mesh:
    """A mesh of these sizes over `devices` (all devices by default). Raises ValueError if the number of devices is not
    the product of the sizes."""
    devices = jax.devices() if devices is None else devices
    if data * fsdp * tensor != len(devices):
        raise ValueError(
            f"a mesh of data {data} x fsdp {fsdp} x tensor {tensor} needs {data * fsdp * tensor} devices, "
            f"there are {len(devices)}"
        )
    # a tensor axis of 8 on a torus of 4 x 4 x 4 takes up two axes of the torus, one of them only in part
    grid = mesh_utils.create_device_mesh((data, fsdp, tensor), devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)


def check_divides(config: LlamaConfig, fsdp: int, tensor: int) -> None:
    """Raise ValueError, naming the dimension, if a parameter of this model cannot be split over axes of these sizes."""
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
    for pattern, split in _TABLE:
        if re.search(rf"(^|/)({pattern})$", name) and leaf.ndim >= len(split):
            return PartitionSpec(*[None] * (leaf.ndim - len(split)), *split)
    return PartitionSpec()


def on_mesh(wanted: PartitionSpec, device_mesh: Mesh) -> PartitionSpec:
    """The spec without the axes that the mesh does not have."""
    return PartitionSpec(*(axis if axis in device_mesh.axis_names else None for axis in wanted))


def by_letters(batch: int, device_mesh: Any) -> Callable[[str], PartitionSpec]:
    """A function from letters, one per dimension of an array, to the array's spec on `device_mesh`: "B" for the rows of
    a batch of `batch` rows, "K" for key/value heads, "-" for neither. Rows are replicated if the mesh's axes do not
    divide their number."""
    rows = tuple(axis for axis in ROWS if axis in device_mesh.axis_names)
    parts = math.prod(device_mesh.shape[axis] for axis in rows)
    names = {
        "B": rows if rows and batch % parts == 0 else None,
        "K": TENSOR if TENSOR in device_mesh.axis_names else None,
        "-": None,
    }
    return lambda letters: PartitionSpec(*(names[letter] for letter in letters))


def spread(array: Any, letters: str, batch: int) -> Any:
    """The array, sharded by its letters (see `by_letters`) over the mesh that is set (`jax.set_mesh`); unchanged if no
    mesh is set."""
    if unsplit():
        return array
    device_mesh = jax.sharding.get_abstract_mesh()
    if isinstance(array, Tracer):
        return jax.lax.with_sharding_constraint(array, by_letters(batch, device_mesh)(letters))
    return jax.device_put(array, NamedSharding(jax.sharding.get_mesh(), by_letters(batch, device_mesh)(letters)))


def unsplit() -> bool:
    """Whether no mesh is set, so that arrays lie on one device."""
    return jax.sharding.get_abstract_mesh().empty


def split_kernel(function: Callable[..., Any], batch: int, inputs: tuple[Any, ...], outputs: Any) -> Callable[..., Any]:
    """The function, run on each device's share of heads and rows if a mesh is set (`jax.set_mesh`): XLA cannot split a
    kernel itself. `inputs` and `outputs` are the letters of each argument and result (see `by_letters`)."""
    if unsplit():
        return function
    device_mesh = jax.sharding.get_abstract_mesh()
    letters = by_letters(batch, device_mesh)
    out_specs = jax.tree.map(letters, outputs)
    return jax.shard_map(function, in_specs=tuple(map(letters, inputs)), out_specs=out_specs, check_vma=False)


def shardings(tree: Any, device_mesh: Mesh) -> Any:
    """The tree with a NamedSharding for each leaf, which is an array or its shape."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: NamedSharding(device_mesh, spec(path, leaf)), tree)
