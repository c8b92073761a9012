"""The page: one HTML file that needs no network, with what every step saw in it."""

from __future__ import annotations

import base64
import json
import zlib
from importlib import resources
from typing import Any

import numpy as np

from recyc_jax.inspect.watched import StepSeen
from recyc_jax.spelling import Spelling


def page(texts: list[str], prompt: int, steps: list[StepSeen], layers: list[int], facts: str) -> str:
    """The page of an answer. `texts` are those of the tokens, of which the first `prompt` are the prompt's; `layers` the
    numbers of those that `steps` tell of."""
    size = len(texts)
    refreshes: list[dict[str, Any]] = []
    told: list[dict[str, Any]] = []
    kept, begins = np.zeros(0, np.uint8), True
    for number, step in enumerate(steps, start=1):
        full = float(np.mean(step.is_full))
        mask = _bits(step.is_read, size)
        changed = ""
        if full < 1:
            if begins:  # the first step after a full one reads what was chosen there, and the tokens since
                kept, begins = mask, False
                refreshes.append({"after": number - 1, "kept": _packed(kept)})
            changed = _packed(mask ^ kept)
        begins = begins or full > 0
        attended = step.tokens.astype("<u4").tobytes() + np.round(255 * step.probabilities).astype(np.uint8).tobytes()
        refresh = len(refreshes) - 1 if refreshes else None
        told.append({"full": full, "refresh": refresh, "changed": changed, "attended": _packed(attended)})
    covered = np.round(255 * np.clip([step.covered for step in steps], 0, 1)).astype(np.uint8)
    data = {
        "facts": facts,
        "texts": texts,
        "prompt": prompt,
        "layers": layers,
        "heads": steps[0].is_read.shape[1] if steps else 1,
        "most": steps[0].tokens.shape[2] if steps else 1,
        "refreshes": refreshes,
        "steps": told,
        "covered": _packed(covered),
    }
    text = (
        json.dumps(data, ensure_ascii=False)
        .replace("<", "\\u003c")
        .replace("\u2028", "\\u2028")
        .replace("\u2029", "\\u2029")
    )
    template = resources.files("recyc_jax.inspect").joinpath("page.html").read_text(encoding="utf-8")
    return template.replace("__DATA__", text, 1)


def texts_of(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text of each token. A character of several tokens is the last one's; special tokens show their names."""
    special, spelling = set(tokenizer.all_special_ids), Spelling(tokenizer)
    texts = []
    for id in ids:
        text = spelling.add([id])
        texts.append(tokenizer.decode([id], skip_special_tokens=False) if id in special else text)
    return texts


def _bits(is_read: np.ndarray, size: int) -> np.ndarray:
    """A mask [L, K, N] in bits, the rows `size` bits long and filled up to bytes."""
    wide = np.zeros((*is_read.shape[:2], size), bool)
    wide[..., : is_read.shape[2]] = is_read
    return np.packbits(wide, axis=-1, bitorder="little")


def _packed(data: Any) -> str:
    return base64.b64encode(zlib.compress(bytes(data), 6)).decode()
