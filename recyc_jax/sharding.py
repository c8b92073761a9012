"""Where arrays lie on a mesh of devices: one table from parameter names to axes.

Axes: `data` (rows of the batch, parameters copied), `fsdp` (rows of the batch, parameters split), `sequence` (slots of
the full caches split, parameters copied), `tensor` (heads, feed-forward features and vocabulary split), `group`
(devices that share key/value heads: query heads, features and vocabulary split further).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from recyc_jax.config import LlamaConfig

TENSOR = "tensor"
SEQUENCE = "sequence"
GROUP = "group"
AXES = ("data", "fsdp", SEQUENCE, TENSOR, GROUP)
HEADS = (TENSOR, GROUP)
"""The axes that query heads, features and vocabulary are split over."""
ROWS = ("data", "fsdp")
"""The axes that a batch's rows are split over."""

# the end of a leaf's path, and the mesh axes that its last dimensions are split over; leading dimensions (stacked
# layers) are not split
_TABLE: tuple[tuple[str, tuple[Any, ...]], ...] = (
    (r"embedding|head", (HEADS, "fsdp")),  # [V, D]
    (r"q_proj/kernel", ("fsdp", HEADS)),  # [D, N * H]
    (r"q_proj/bias", (HEADS,)),
    (r"[kv]_proj/kernel", ("fsdp", TENSOR)),  # [D, K * H]
    (r"[kv]_proj/bias", (TENSOR,)),
    (r"o_proj/kernel", (HEADS, "fsdp")),  # [N * H, D]
    (r"(gate|up)_proj/kernel", ("fsdp", HEADS)),  # [D, F]
    (r"down_proj/kernel", (HEADS, "fsdp")),  # [F, D]
)


def mesh(
    data: int, fsdp: int, tensor: int, devices: Any = None, sequence: int = 1, kv_heads: int | None = None
) -> Mesh:
    """A mesh of these sizes over `devices` (all devices by default). If `tensor` is a multiple of the model's `kv_heads`,
    which are fewer, so many devices form a group that shares a key/value head. Raises ValueError if the number of devices
    is not the product of the sizes."""
    devices = jax.devices() if devices is None else devices
    group = tensor // kv_heads if kv_heads is not None and tensor % kv_heads == 0 else 1
    sizes = data, fsdp, sequence, tensor // group, group
    if math.prod(sizes) != len(devices):
        said = " x ".join(f"{name} {size}" for name, size in zip(AXES, (*sizes[:3], tensor), strict=False))
        raise ValueError(f"a mesh of {said} needs {math.prod(sizes)} devices, there are {len(devices)}")
    # a tensor axis of 8 on a torus of 4 x 4 x 4 takes up two axes of the torus, one of them only in part
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def sizes(device_mesh: Any) -> dict[str, int]:
    """The sizes that `mesh` was asked for, by name; that of `sequence` where it is not 1."""
    shape = dict(device_mesh.shape)
    tensor = shape.get(TENSOR, 1) * shape.pop(GROUP, 1)
    if shape.get(SEQUENCE, 1) == 1:
        shape.pop(SEQUENCE, None)
    return shape | {TENSOR: tensor}


def check_divides(config: LlamaConfig, fsdp: int, tensor: int) -> None:
    """Raise ValueError, naming the dimension, if a parameter of this model cannot be split over axes of these sizes."""
    # with fewer key/value heads than devices, groups of devices share one
    heads = "num_attention_heads" if tensor % config.num_key_value_heads == 0 else "num_key_value_heads"
    for name, size, axis, parts in (
        (heads, getattr(config, heads), "tensor", tensor),
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

    def there(axis: Any) -> Any:
        if isinstance(axis, tuple):
            names = tuple(name for name in axis if name in device_mesh.axis_names)
            return names if len(names) > 1 else next(iter(names), None)
        return axis if axis in device_mesh.axis_names else None

    return PartitionSpec(*map(there, wanted))


def by_letters(batch: int, device_mesh: Any) -> Callable[[str], PartitionSpec]:
    """A function from letters, one per dimension of an array, to the array's spec on `device_mesh`: "B" for the rows of
    a batch of `batch` rows, "K" for key/value heads, "G" for the query heads of one of these, "N" for all query
    heads, or features, or the vocabulary, "S" for slots of the full cache, "-" for none of these. Rows are replicated if
    the mesh's axes do not divide their number."""
    rows = tuple(axis for axis in ROWS if axis in device_mesh.axis_names)
    parts = math.prod(device_mesh.shape[axis] for axis in rows)
    names = {
        "B": rows if rows and batch % parts == 0 else None,
        "K": TENSOR if TENSOR in device_mesh.axis_names else None,
        "G": GROUP if GROUP in device_mesh.axis_names else None,
        "N": tuple(axis for axis in HEADS if axis in device_mesh.axis_names) or None,
        "S": SEQUENCE if SEQUENCE in device_mesh.axis_names else None,
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
        return lax.with_sharding_constraint(array, by_letters(batch, device_mesh)(letters))
    return jax.device_put(array, place_of(letters, batch))


def fetched(array: Any) -> np.ndarray:
    """The whole array in numpy, also where devices of other processes hold parts of it; all processes call it then."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def place_of(letters: str, batch: int) -> NamedSharding | None:
    """The sharding of an array with these letters (see `by_letters`) over the mesh that is set; None if none is."""
    if unsplit():
        return None
    device_mesh = jax.sharding.get_mesh()
    return NamedSharding(device_mesh, by_letters(batch, device_mesh)(letters))


def unsplit() -> bool:
    """Whether arrays lie on one device: no mesh is set, or the code is one device's share (inside of `shard_map`)."""
    device_mesh = jax.sharding.get_abstract_mesh()
    return device_mesh.empty or all(kind == AxisType.Manual for kind in device_mesh.axis_types)


def slot_shares() -> int:
    """The number of devices that share the slots of a full cache."""
    return jax.sharding.get_abstract_mesh().shape.get(SEQUENCE, 1)


def first_slot(capacity: int) -> Any:
    """The first slot of the device's share, of `capacity` slots, of a full cache; called inside of `shard_map`."""
    if slot_shares() == 1:
        return jnp.zeros((), jnp.int32)
    return lax.axis_index(SEQUENCE).astype(jnp.int32) * capacity


def split_kernel(function: Callable[..., Any], batch: int, inputs: tuple[Any, ...], outputs: Any) -> Callable[..., Any]:
    """The function, run on each device's share of heads and rows if a mesh is set (`jax.set_mesh`): XLA cannot split a
    kernel itself. `inputs` and `outputs` are the letters of each argument and result (see `by_letters`), or trees of
    them: letters at an inner node are those of all its leaves, of which they may name the first dimensions alone."""
    if unsplit():
        return function
    letters = by_letters(batch, jax.sharding.get_abstract_mesh())
    in_specs, out_specs = (jax.tree.map(letters, one) for one in (inputs, outputs))
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


class Split(NamedTuple):
    """How a batch is split over the mesh that is set."""

    rows: int  # that a device has
    tensor: int  # devices that share the query heads of a row
    group: int = 1  # devices of these that share a key/value head


def split_of(batch: int) -> Split:
    """How `batch` rows are split over the mesh that is set (`jax.set_mesh`); on one device if none is."""
    if unsplit():
        return Split(batch, 1, 1)
    shape = jax.sharding.get_abstract_mesh().shape
    parts = math.prod(shape.get(axis, 1) for axis in ROWS)
    group = shape.get(GROUP, 1)
    return Split(batch // parts if batch % parts == 0 else batch, shape.get(TENSOR, 1) * group, group)


def over_heads(function: Callable[..., Any], array: Any, axes: tuple[str, ...] = HEADS) -> Any:
    """The array under a collective, such as `lax.psum`, over the devices that share a row's heads, or of one group; called
    inside of `shard_map`, and unchanged outside of a mesh."""
    axes = tuple(axis for axis in axes if axis in jax.sharding.get_abstract_mesh().axis_names)
    return function(array, axes) if axes else array


def rows_of(table: Any, numbers: Any, mesh: Mesh | None = None) -> Any:
    """The rows [B, T, D] of an embedding table [V, D] at these numbers [B, T], the nearest row for one outside of it. Over
    a mesh (None: the one that is set) each device looks up what its share of the table has, and the results are added:
    XLA itself would gather the whole table first, or make each row on every device."""
    device_mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    axes = tuple(axis for axis in HEADS if axis in device_mesh.axis_names)
    parts = math.prod(device_mesh.shape[axis] for axis in axes)
    if (mesh is None and unsplit()) or not axes or table.shape[0] % parts:
        return jnp.take(table, numbers, axis=0, mode="clip")

    def on_device(part: Any, numbers: Any) -> Any:
        at = numbers - lax.axis_index(axes).astype(numbers.dtype) * part.shape[0]
        found = jnp.take(part, at, axis=0, mode="clip")
        is_here = (at >= 0) & (at < part.shape[0])
        return lax.psum(jnp.where(is_here[..., None], found, 0), axes)

    letters = by_letters(numbers.shape[0], device_mesh)
    specs = letters("N-"), letters("B-")
    local = jax.shard_map(on_device, mesh=device_mesh, in_specs=specs, out_specs=letters("B--"), check_vma=False)
    return local(table, jnp.clip(numbers, 0, table.shape[0] - 1))


def shardings(tree: Any, device_mesh: Mesh) -> Any:
    """The tree with a NamedSharding for each leaf, which is an array or its shape."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: NamedSharding(device_mesh, spec(path, leaf)), tree)
