"""Digests of files, remembered: a file is read once, and again only after it has changed.

What is remembered lies in a folder beside the cache folder, one small file per digested file, and counts as long as
the file's size, times of its last change and inode are the same. Where that cannot be written, digests are computed each
time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from recyc_jax.loading import fetch

_SETTLED_S = 2.0  # a file that was written less than this ago may change again without a new modification time


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's bytes, 64 hex digits. Raises OSError if the file cannot be read."""

    def compute() -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return _remembered(path, "bytes", compute)


def tensor_digests(path: Path) -> dict[str, str]:
    """By name, the SHA-256 of the dtype, shape and bytes of each tensor of a safetensors file. Raises ValueError,
    naming the file, if it is not a complete safetensors file."""
    return _remembered(path, "tensors", lambda: _tensor_digests(path))


def _tensor_digests(path: Path) -> dict[str, str]:
    begin, header = safetensors_header(path)

    def digest(name: str) -> str:
        facts = header[name]
        first, end = facts["data_offsets"]
        found = hashlib.sha256(f"{facts['dtype']} {facts['shape']}".encode())
        with path.open("rb") as file:
            file.seek(begin + first)
            left = end - first
            while left:
                piece = file.read(min(left, 1 << 22))
                if not piece:
                    raise ValueError(f"{path}: not a complete safetensors file (it ends within {name})")
                found.update(piece)
                left -= len(piece)
        return found.hexdigest()

    with ThreadPoolExecutor(8) as pool:  # hashing releases Python's lock
        return dict(zip(header, pool.map(digest, header), strict=True))


def safetensors_header(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Where the tensors of a safetensors file begin, in bytes, and by name each tensor's `dtype`, `shape` and
    `data_offsets`. Raises ValueError, naming the file, if its header cannot be read or its tensors do not fill it."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > path.stat().st_size - 8:
                raise ValueError("it ends within its header")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        for name, facts in header.items():
            if not isinstance(facts["dtype"], str) or not all(isinstance(each, int) for each in facts["shape"]):
                raise ValueError(f"the header of {name} is malformed")
        begin = 8 + size
        end = begin + max((facts["data_offsets"][1] for facts in header.values()), default=0)
        if end != path.stat().st_size:
            raise ValueError(f"it has {path.stat().st_size} bytes, its header asks for {end}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error})") from None
    return begin, header


def _remembered(path: Path, kind: str, compute: Callable[[], Any]) -> Any:
    """The digest that `compute` returns, or that an earlier call of this kind stored for the same file."""
    path = path.resolve()
    place = hashlib.sha256(f"{kind} {path}".encode(errors="surrogateescape")).hexdigest()[:32]
    cache = fetch.cache_dir()
    memory = cache.with_name(f"{cache.name}-digests") / f"{place}.json"
    facts = _facts(path)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        stored = json.loads(memory.read_text(encoding="utf-8"))
        if stored["file"] == facts:
            return stored["digest"]
    digest = compute()
    if _facts(path) == facts and time.time() - max(facts["mtime_ns"], facts["ctime_ns"]) / 1e9 > _SETTLED_S:
        with contextlib.suppress(OSError, ValueError), fetch.building(memory, replace=True) as work:
            work.write_text(json.dumps({"file": facts, "digest": digest}), encoding="utf-8")
    return digest


def _facts(path: Path) -> dict[str, int]:
    stat = path.stat()
    # the time of the last change of the inode too: copies may keep the modification time
    times = {"mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns}
    return {"size": stat.st_size, "inode": stat.st_ino, "device": stat.st_dev} | times
