"""The flags of `python -m eval.speed`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from recyc_jax.commands.backends import Backend


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure decode steps, or estimate them."""

    model: str = "smollm2-135m"
    """A model shape: smollm2-135m, qwen2.5-0.5b, llama-3.2-1b, llama-3.1-8b, llama-3.1-70b, qwen3-8b, gemma-3-12b; or a
    folder with a config.json."""
    batch: int = 1
    lengths: str = "2048,4096,8192"
    """Comma-separated total lengths: tokens in the cache during the steps."""
    policies: tuple[str, ...] = ("full", "lookahead:budget=512,stride=50", "recycled:budget=512,stride=50")
    estimate: bool = False
    """Run nothing; print the least time of the steps on `--device`, and from which length and batch recycling pays."""
    device: Literal["v5e", "v5p", "v6e", "h100", "h200"] = "h100"
    """With --estimate: the type of chip."""
    chips: int = 1
    """With --estimate: chips that share the model evenly. Their communication is not counted."""
    bandwidth: float | None = None
    """With --estimate: bandwidth of a chip in GB/s. Default: as measured for a copy, or else the vendor's."""
    mesh: str | None = None
    """Measure over several devices: data=2,tensor=2, or auto (as in `eval.ruler`). Default: one device."""
    prefill: bool = False
    """Also time the prefill of a prompt of each length; the steps still use a cache filled with random numbers."""
    repeats: int = 5
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    backend: Backend = "auto"
    implementation: Literal["auto", "reference", "pallas"] = "auto"
    seed: int = 0
    allow_beyond_context: bool = False
    out: Path = Path("results/speed")
