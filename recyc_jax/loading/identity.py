"""A fingerprint of the weights in a folder, independent of the folder's name."""

from __future__ import annotations

import hashlib
from pathlib import Path


def of_weights(folder: Path) -> str:
    """16 hex digits of a SHA-256 over the config and each weight file's name, size and first MiB (the header and the
    first tensor data)."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            digest.update(f"{file.name} {file.stat().st_size}".encode() + opened.read(1 << 20))
    return digest.hexdigest()[:16]
