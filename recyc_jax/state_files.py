"""States on disk: a folder with the arrays of a state (safetensors) and a card (JSON) that says how they fit together.

The card is written last and replaced in one step, so a folder holds the state before or the state after, never half of
one. It names the file of arrays and the CRC-32 of each, and the model: a state of another model is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import json
import re
import uuid
import weakref
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, UInt

from recyc_jax import sharding
from recyc_jax.config import LlamaConfig

FORMAT = 1
CARD = "card.json"


class Origin:
    """The model that made a state: its config, and its parameters as long as the caller keeps them. Two are equal if they
    were made of the same arrays, so that states of one model are of one type under `jax.jit`."""

    def __init__(self, params: Any, config: LlamaConfig) -> None:
        leaves, self._tree = jax.tree.flatten(params)
        self.config, self._leaves = config, [weakref.ref(leaf) for leaf in leaves]
        self._ids = (config, *map(id, leaves))

    @classmethod
    def of(cls, params: Any, config: LlamaConfig) -> Origin | None:
        """None inside `jax.jit`, where there are no arrays."""
        leaves = jax.tree.leaves(params)
        return None if any(isinstance(leaf, Tracer) for leaf in leaves) else cls(params, config)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Origin) and self._ids == other._ids

    def __hash__(self) -> int:
        return hash(self._ids)

    def model(self) -> dict[str, Any]:
        """What the card says of the model. Raises ValueError if its parameters are gone."""
        leaves = [leaf() for leaf in self._leaves]
        if any(leaf is None or (isinstance(leaf, jax.Array) and leaf.is_deleted()) for leaf in leaves):
            raise ValueError(
                "the parameters that made this state are gone: keep them, or pass params and config to save"
            )
        return described(jax.tree.unflatten(self._tree, leaves), self.config)


def described(params: Any, config: LlamaConfig) -> dict[str, Any]:
    """A fingerprint of parameters and config, 16 hex digits, and what people know a model by."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    found = hashlib.sha256(json.dumps(fields, sort_keys=True, default=repr).encode())
    leaves = jax.tree_util.tree_leaves_with_path(params)
    sums = jax.device_get([_digest(jnp.asarray(leaf)) for _, leaf in leaves])
    for (path, leaf), digest in zip(leaves, sums, strict=True):
        found.update(f"\0{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape} {digest.tolist()}".encode())
    layers, width, dtype = config.num_hidden_layers, config.hidden_size, leaves[0][1].dtype
    shape = f"{layers} layers of width {width}, {config.vocab_size} tokens, {dtype}"
    return {"fingerprint": found.hexdigest()[:16], "shape": shape}


@jax.jit
def _digest(leaf: Array) -> UInt[Array, "2"]:
    """Two sums over all elements, of their bits mixed with their places. Whole numbers: the order of summing, and so the
    device and how the array is sharded, change nothing."""
    bits = lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")).astype(jnp.uint32)
    place, stride = jnp.zeros(leaf.shape, jnp.uint32), 1
    for axis in reversed(range(leaf.ndim)):
        place = place + lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= leaf.shape[axis]
    sums = []
    for first, second in ((0x9E3779B1, 0x85EBCA6B), (0xC2B2AE35, 0x27D4EB2F)):
        mixed = (bits * jnp.uint32(first)) ^ (place * jnp.uint32(second))
        mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x2C1B3C6D)
        sums.append(jnp.sum(mixed ^ (mixed >> 13), dtype=jnp.uint32))
    return jnp.stack(sums)


# --- writing ---------------------------------------------------------------------------------------------------------


def write(folder: Path | str, state: Any, model: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write a state of this model. `facts` go into the card. An earlier state in the folder is replaced. Raises ValueError
    for what cannot be written (a class from outside of this package, arrays of several processes), OSError where the
    folder cannot."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and ((folder / CARD).is_file() or not any(folder.iterdir()))):
        raise ValueError(f"{folder} holds something else than a state: name another folder")
    arrays: dict[str, np.ndarray] = {}
    tree = _encoded(state, "state", arrays)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"state-{uuid.uuid4().hex[:12]}.safetensors"
    draft = folder / f"{CARD}.{file.stem}"
    card = {"format": FORMAT, "model": model, **facts, "file": file.name, "crc32": _sums(arrays), "tree": tree}
    try:
        try:
            save_file(arrays, file)
        except SafetensorError as error:  # how it reports a full disk
            raise OSError(f"{file}: {error}") from error
        draft.write_text(json.dumps(card, indent=1), encoding="utf-8")
        draft.replace(folder / CARD)
    except BaseException:
        for one in (file, draft):
            one.unlink(missing_ok=True)
        raise
    for old in folder.glob("state-*.safetensors"):
        if old != file:
            with contextlib.suppress(OSError):
                old.unlink()


def _encoded(value: Any, path: str, arrays: dict[str, np.ndarray]) -> Any:
    """The JSON form of a tree, whose arrays go into `arrays` by path."""
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    if isinstance(value, Origin):
        return {"value": None}
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return _encoded_array(value, path, arrays)
    if isinstance(value, frozenset):
        return {"set": sorted(value)}
    if isinstance(value, dict):
        return {"dict": [[key, _encoded(one, f"{path}.{key}", arrays)] for key, one in value.items()]}
    names = _field_names(type(value))
    if names is not None:
        kind = f"{type(value).__module__}:{type(value).__qualname__}"
        if _class(kind) is not type(value):
            raise ValueError(f"{path} is a {kind}, of which the state cannot be saved: `rewind` the state first")
        return {"class": kind, "fields": {n: _encoded(getattr(value, n), f"{path}.{n}", arrays) for n in names}}
    if isinstance(value, tuple | list):
        return {type(value).__name__: [_encoded(one, f"{path}.{n}", arrays) for n, one in enumerate(value)]}
    raise ValueError(f"{path} is a {type(value).__name__}, which cannot be saved")


def _encoded_array(value: Any, path: str, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        raise ValueError("this state lies on the devices of several processes: only one process's states can be saved")
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        arrays[path] = np.asarray(jax.random.key_data(value))
        return {"keys": path, "generator": str(jax.random.key_impl(value))}
    # of a copy: an array remembers what was read of it, and could then not be donated to the next call
    arrays[path] = np.ascontiguousarray(jax.device_get(jnp.copy(value))).reshape(np.shape(value))
    return {"array": path}


def _field_names(kind: type) -> list[str] | None:
    """The fields of a dataclass or named tuple; None for other classes."""
    if dataclasses.is_dataclass(kind):
        return [field.name for field in dataclasses.fields(kind) if field.init]
    return list(getattr(kind, "_fields", ())) if issubclass(kind, tuple) and hasattr(kind, "_fields") else None


def _class(kind: str) -> type | None:
    """The class of this package that a card names; None if there is none."""
    module, _, name = kind.partition(":")
    if not re.fullmatch(r"recyc_jax(\.[a-z_0-9]+)+:[A-Za-z_0-9]+", kind):
        return None
    with contextlib.suppress(ImportError):
        found = getattr(importlib.import_module(module), name, None)
        if isinstance(found, type) and found.__module__ == module and _field_names(found) is not None:
            return found
    return None


def _sums(arrays: dict[str, np.ndarray]) -> dict[str, str]:
    """The CRC-32 of each array's bytes."""

    def one(array: np.ndarray) -> str:
        return f"{zlib.crc32(array.reshape(-1).view(np.uint8).data):08x}"

    with ThreadPoolExecutor(8) as pool:  # zlib releases Python's lock
        return dict(zip(arrays, pool.map(one, arrays.values()), strict=True))


# --- reading ---------------------------------------------------------------------------------------------------------


def read_card(folder: Path | str) -> dict[str, Any]:
    """The card of a folder. Raises ValueError, naming the file, if there is none or it is not one."""
    file = Path(folder) / CARD
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
        named, kinds = [card[name] for name in ("file", "crc32", "tree", "model")], (str, dict, dict, dict)
        if not all(map(isinstance, named, kinds)) or Path(card["file"]).name != card["file"]:
            raise ValueError("it lacks parts")
    except FileNotFoundError:
        raise ValueError(f"{file} is not there: name a folder that a state was saved to") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file}: not the card of a state ({error})") from None
    if card.get("format") != FORMAT:
        raise ValueError(f"{file}: format {card.get('format')!r} is of another version of recyc_jax; {FORMAT} is known")
    return card


def load_state(folder: Path | str, params: Any, config: LlamaConfig) -> Any:
    """The state that `Prefilled.save` wrote, on the device or, if a mesh is set, in shards. It goes on as the state that
    was saved would have: the same tokens, also in the middle of an answer.

    Raises ValueError, naming the file, for a state of another model or another version of this package, and for a file
    that is torn or was changed. It loads on the kind of implementation that wrote it (`decode` refuses others)."""
    import safetensors

    card, folder = read_card(folder), Path(folder)
    own = described(params, config)
    if card["model"] != own:
        theirs = f"{card['model'].get('shape')}, fingerprint {card['model'].get('fingerprint')}"
        raise ValueError(
            f"{folder} is a state of another model ({theirs}) than this one ({own['shape']}, fingerprint"
            f" {own['fingerprint']}): load it with the model that made it"
        )
    file = folder / card["file"]
    try:
        with safetensors.safe_open(file, framework="numpy") as stored:
            arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file}: not a complete safetensors file ({error})") from None
    sums = _sums(arrays)
    for name in sorted(sums.keys() | card["crc32"].keys()):
        if sums.get(name) != card["crc32"].get(name):
            raise ValueError(f"{file}: {name} is not what was saved: the file is damaged, save the state again")
    try:
        state = _decoded(card["tree"], arrays, card["rows"], config.num_key_value_heads)
        return dataclasses.replace(state, origin=Origin.of(params, config))
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder / CARD}: not the card of a state of this version ({error})") from None


def _decoded(node: Any, arrays: dict[str, np.ndarray], rows: int, kv_heads: int) -> Any:
    """The tree that `_encoded` gave as JSON."""
    said = {kind: value for kind, value in node.items() if kind not in ("fields", "generator")}
    if len(said) != 1:
        raise ValueError(f"a node of its tree says {sorted(said)}, where one word belongs")
    ((kind, value),) = said.items()

    def inner(one: Any) -> Any:
        return _decoded(one, arrays, rows, kv_heads)

    if kind == "value":
        return value
    if kind == "array":
        return _placed(arrays[value], rows, kv_heads)
    if kind == "keys":
        return jax.random.wrap_key_data(jnp.asarray(arrays[value]), impl=node["generator"])
    if kind == "set":
        return frozenset(value)
    if kind == "dict":
        return {key: inner(one) for key, one in value}
    if kind == "class":
        made = _class(value)
        if made is None:
            raise ValueError(f"{value} is unknown")
        return made(**{name: inner(one) for name, one in node["fields"].items()})
    return {"tuple": tuple, "list": list}[kind](inner(one) for one in value)


def _placed(array: np.ndarray, rows: int, kv_heads: int) -> Any:
    """The array on the device; under a mesh its rows and key/value heads are split as those of a new state."""
    axes = ["-"] * array.ndim
    for axis, (letter, size) in enumerate((("B", rows), ("K", kv_heads))):
        if axis < array.ndim and array.shape[axis] == size and (axis == 0 or axes[0] == "B"):
            axes[axis] = letter
    return sharding.spread(jnp.asarray(array), "".join(axes), rows)
