"""Time of a decode step in Hugging Face transformers, to compare with `eval.speed`: `python -m eval.peer`.

The model has the same shape and random weights; the steps use a static cache filled with random keys and values, greedy
sampling, SDPA and `torch.compile`. This is a separate command because PyTorch and JAX do not share the memory of a GPU
well. Needs `.[reference]`.
"""

from __future__ import annotations

import dataclasses
import inspect
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from recyc_jax import shapes
from recyc_jax.commands import command_line, files, json_lines

if TYPE_CHECKING:
    from recyc_jax import LlamaConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure decode steps of transformers."""

    model: str = "smollm2-135m"
    """A model shape by name, or a folder with a config.json, as in `eval.speed`."""
    batch: int = 1
    lengths: str = "2048,4096,8192"
    """Comma-separated numbers of tokens in the cache."""
    steps: int = 20
    """Steps per timed run."""
    repeats: int = 5
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    compiled: bool = True
    """torch.compile the step, with CUDA graphs on a GPU."""
    seed: int = 0
    out: Path = Path("results/peer")


def main(args: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    config = tyro.cli(Config, prog="python -m eval.peer", args=args)
    return command_line.run(_prepare, config, "the rows so far are kept")


def _prepare(config: Config) -> Callable[[], None]:
    lengths = command_line.lengths(config.lengths)
    command_line.check_counts(batch=config.batch, steps=config.steps, repeats=config.repeats)
    shape = shapes.named_shape(config.model)
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ValueError(f"eval.peer needs {error.name}: pip install -e '.[reference]'") from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    files.writable_folder("--out", config.out)

    def measure() -> None:
        torch.manual_seed(config.seed)
        dtype = getattr(torch, config.dtype)
        model = _model(shape, max(lengths) + config.steps, dtype, device)
        facts = {
            "policy": "transformers, static cache" + (", torch.compile" if config.compiled else ""),
            "model": config.model,
            "batch": config.batch,
            "dtype": config.dtype,
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        }
        file = config.out / "peer.jsonl"
        with json_lines.appending(file) as add:
            for length in lengths:
                command_line.heed_interrupt()
                row = {"length": length, **_step_ms(config, model, length, dtype, device), **facts}
                add(row)
                print(f"{length}: {row['mean_ms']} ms a step, {row['compile_s']} s to compile", flush=True)
        print(f"{file} holds the results")

    return measure


def _model(shape: LlamaConfig, positions: int, dtype: Any, device: str) -> Any:
    """A Llama of this shape with random weights."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers import LlamaConfig as Llama

    config = Llama(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=positions,
        tie_word_embeddings=shape.tie_word_embeddings,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def _step_ms(config: Config, model: Any, length: int, dtype: Any, device: str) -> dict[str, Any]:
    """Milliseconds per step: the median over runs of `steps` steps, which begin with `length - steps` tokens in the
    cache."""
    import torch
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=length)
    held = (model.config.num_key_value_heads, model.config.head_dim)
    cache.early_initialization(config.batch, *held, dtype=dtype, device=torch.device(device))
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()

    # transformers 5.24 renamed the argument
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    def step(token: Any, position: Any) -> Any:
        logits = model(input_ids=token, position_ids=position, **{name: cache}).logits
        return logits[:, -1:].argmax(-1)

    run_step = torch.compile(step, mode="reduce-overhead" if device == "cuda" else None) if config.compiled else step

    @torch.no_grad()
    def run() -> float:
        for layer in cache.layers:  # rewind the cache to its initial length
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length.fill_(length - config.steps)
        token = torch.zeros((config.batch, 1), dtype=torch.long, device=device)
        began = time.perf_counter()
        for number in range(config.steps):
            position = torch.full((config.batch, 1), length - config.steps + number, device=device)
            token = run_step(token, position).clone()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    first = run()
    run()
    took = statistics.median(run() for _ in range(config.repeats))
    return {
        "mean_ms": round(1000 * took / config.steps, 4),
        "tokens_per_s": round(config.batch * config.steps / took, 1),
        "compile_s": round(max(0.0, first - took), 1),
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    }


if __name__ == "__main__":
    sys.exit(main())
