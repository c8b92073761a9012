"""Imports go one way, and importing does no work."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
ORDER = [  # each module may import from lines above its own
    {"recyc_jax.config", "recyc_jax.fetch", "recyc_jax.sampling"},
    {"recyc_jax.rope", "recyc_jax.prompts", "recyc_jax.gguf_tokenizer", "recyc_jax.shapes", "recyc_jax.sharding"},
    {"recyc_jax.cache", "recyc_jax.gguf_convert"},
    {"recyc_jax.projections"},
    {"recyc_jax.attention.select", "recyc_jax.attention.triton"},
    {
        "recyc_jax.attention.reference",
        "recyc_jax.attention.select_gpu",
        "recyc_jax.attention.prefill_gpu",
        "recyc_jax.projections_gpu",
    },
    {
        "recyc_jax.attention.api",
        "recyc_jax.attention.pallas_gpu",
        "recyc_jax.attention.pallas_tpu",
        "recyc_jax.attention.training",
    },
    {"recyc_jax.attention.training_tiles_gpu"},
    {"recyc_jax.attention.training_forward_gpu", "recyc_jax.attention.training_backward_gpu"},
    {"recyc_jax.attention.training_selecting_gpu"},
    {"recyc_jax.attention.training_gpu"},
    {"recyc_jax.attention.training_api"},
    {"recyc_jax.policies.base", "recyc_jax.policies.schedules"},
    {"recyc_jax.policies.recycled_set"},
    {
        "recyc_jax.policies.full",
        "recyc_jax.policies.h2o",
        "recyc_jax.policies.recycled",
        "recyc_jax.policies.snapkv",
        "recyc_jax.policies.streaming_llm",
    },
    {"recyc_jax.policies.registry"},
    {"recyc_jax.model"},
    {"recyc_jax.prefill", "recyc_jax.pretrained"},
    {"recyc_jax.decode", "recyc_jax.export"},
    {"recyc_jax"},
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}


def modules():
    for path in sorted((ROOT / "recyc_jax").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        yield name, path


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in LEVEL else node.module


def test_imports_go_one_way():
    for name, path in modules():
        ours = {module for module in imported(path) if module.split(".")[0] in ("recyc_jax", "eval", "train")}
        for module in ours - {"recyc_jax.attention", "recyc_jax.policies"}:
            assert module in LEVEL, f"{name} imports {module}, which has no place in ORDER"
            assert LEVEL[module] < LEVEL[name], f"{name} imports {module}"


def test_importing_starts_nothing():
    """No device query, no torch, no tokenizer library, no network module at import."""
    code = (
        "import sys, recyc_jax, jax; from jax._src import xla_bridge; assert not xla_bridge._backends;"
        "assert not {'torch', 'transformers', 'huggingface_hub', 'gguf', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
