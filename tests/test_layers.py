"""Modules import only from lower layers, and importing does no work."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIBRARY = [  # a module may import only from lines above its own
    "validation tiny_shape",
    "rope_scaling",
    "families",
    "config",
    "rope shapes sharding sampling",
    "prompts",
    "cache",
    "attention.selection attention.remainder",
    "attention.reference",
    "attention.kept attention.whole_sequence",
    "attention.implementation",
    "attention.split_slots",
    "model",
    "sliding_window",
    "cached_attention",
    "kernels.gpu.triton_call kernels.tpu.tiles",
    "kernels.gpu.rows",
    "kernels.gpu.decode_attention kernels.gpu.prefill_attention kernels.gpu.top_slots kernels.gpu.products",
    "kernels.gpu.turn_attention",
    "kernels.gpu.normed",
    "kernels.tpu.decode_attention kernels.tpu.prefill_attention kernels.tpu.compaction kernels.tpu.copied_set",
    "kernels.gpu.decoder_layers kernels.gpu.whole_sequence.tiling",
    "kernels.gpu.whole_sequence.forward kernels.gpu.whole_sequence.backward",
    "kernels.gpu.whole_sequence.selection_gradients kernels.gpu.whole_sequence.gathering",
    "kernels.gpu.whole_sequence.recycled kernels.gpu.implementation kernels.tpu.implementation",
    "implementations",
    "training_implementations",
    "policies.base",
    "policies.schedules",
    "policies.recycled_parts policies.full policies.h2o policies.streaming_llm",
    "policies.recycled policies.quest policies.top_k",
    "policies.lookahead policies.snapkv policies.ablations",
    "policies.lossless",
    "policies.registry state_files",
    "prefilling",
    "pacing",
    "generation_loop lossless",
    "answers results generation_checks",
    "decoding",
    "generation",
    "scoring turns spelling",
    "testing",
    "streaming",
    "text",
    "loading.fetch loading.json_files loading.tokenizer loading.gguf_fields",
    "loading.digests loading.gguf_file loading.tensor_names",
    "loading.weights loading.gguf_parts loading.gguf_metadata loading.gguf_vocabulary",
    "loading.identity loading.gguf_tokenizer",
    "loading.gguf_convert",
    "loading.pretrained",
    "loading.export",
]
COMMANDS = [
    "text_files html_text locks numbers plotting json_lines measuring novels relay second_signal background",
    "files companions",
    "together",
    "hosts",
    "command_line backends run_log documents compiling",
    "programs",
    "corpus converse",
]
INSPECT = [
    "watched",
    "page",
    "__main__",
]
SERVE = [
    "jobs kept_states",
    "asked engine",
    "metrics",
    "app",
    "__main__",
]
TRAIN = [
    "config",
    "data optimizer loss metrics signals progress",
    "forward evaluation figures",
    "step card",
    "checkpoint",
    "run",
    "state",
    "opening dry_run",
    "loop",
    "continued_pretrain report attention_speed",
    "step_speed",
]


def names(lines, package):
    return [{f"{package}.{name}" for name in line.split()} for line in lines]


def levels():
    order = [
        *names(LIBRARY, "recyc_jax"),
        {"recyc_jax"},
        *names(COMMANDS, "recyc_jax.commands"),
        *names(SERVE, "recyc_jax.serve"),
        *names(INSPECT, "recyc_jax.inspect"),
        {"recyc_jax.__main__"},
        *names(TRAIN, "train"),
    ]
    return {name: level for level, some in enumerate(order) for name in some}


LEVEL = levels()
SUBPACKAGES = (
    *("attention", "kernels", "kernels.gpu", "kernels.gpu.whole_sequence", "kernels.tpu"),
    *("policies", "loading", "commands", "serve", "inspect"),
)
PACKAGES = {f"recyc_jax.{name}" for name in SUBPACKAGES} | {"train", "eval"}
KNOWN = {*LEVEL, *PACKAGES}


def modules(package):
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imported(path):
    """The modules of this repository that a file imports, anywhere in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name if name in KNOWN or is_module(name) else node.module for name in whole]
        else:
            continue
        yield from (name for name in found if name.split(".")[0] in ("recyc_jax", "eval", "train"))


def is_module(name):
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def test_imports_go_one_way():
    for package in ("recyc_jax", "train"):
        for name, path in modules(package):
            if name in PACKAGES:
                continue
            for module in set(imported(path)) - PACKAGES:
                assert module in LEVEL, f"{name} imports {module}, which has no place in the order above"
                assert LEVEL[module] < LEVEL[name] or name == "recyc_jax", f"{name} imports {module}"


def test_every_module_has_a_place():
    found = {name for package in ("recyc_jax", "train") for name, _ in modules(package)}
    assert found == KNOWN - {"eval"}


def test_the_library_knows_no_command():
    """The library does not import from `eval` or `train`, and these do not import from each other."""
    for package, forbidden in (("recyc_jax", ("eval", "train")), ("eval", ("train",)), ("train", ("eval",))):
        for name, path in modules(package):
            tops = {module.split(".")[0] for module in imported(path)}
            assert not tops & set(forbidden), f"{name} imports from {tops & set(forbidden)}"
            if package == "recyc_jax" and not name.startswith(
                ("recyc_jax.commands", "recyc_jax.serve", "recyc_jax.inspect", "recyc_jax.__main__")
            ):
                assert not [module for module in imported(path) if module.startswith("recyc_jax.commands")], name


def test_nothing_reaches_for_private_names():
    """No module uses another module's names that begin with an underscore."""
    for package in ("recyc_jax", "eval", "train"):
        for name, path in modules(package):
            tree = ast.parse(path.read_text())
            ours = {
                alias.asname or alias.name.split(".")[-1]
                for node in ast.walk(tree)
                if isinstance(node, ast.ImportFrom)
                and (node.module or "").split(".")[0] in ("recyc_jax", "eval", "train")
                for alias in node.names
            }
            for node in ast.walk(tree):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ours:
                    private = node.attr.startswith("_") and not node.attr.startswith("__")
                    assert not private or node.attr in ("_replace", "_asdict"), f"{name}: {node.value.id}.{node.attr}"


def test_importing_starts_nothing():
    """Importing queries no device and imports no torch, tokenizer library or network module; `import recyc_jax` alone
    does not import JAX, so that commands answer `--help` at once."""
    code = (
        "import sys, recyc_jax; assert 'jax' not in sys.modules;"
        "[getattr(recyc_jax, name) for name in recyc_jax.__all__];"
        "from jax._src import xla_bridge; assert not xla_bridge._backends;"
        "assert not {'torch', 'transformers', 'huggingface_hub', 'gguf', 'datasets', 'tyro', 'optax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_names_that_moved_say_so():
    code = (
        "import warnings; warnings.simplefilter('error', DeprecationWarning)\n"
        "import recyc_jax, eval\n"
        "for package, name in ((recyc_jax, 'pretrained'), (recyc_jax, 'fetch'), (eval, 'documents')):\n"
        "    try: getattr(package, name)\n"
        "    except DeprecationWarning as warning: assert 'is deprecated: it is recyc_jax.' in str(warning), warning\n"
        "    else: raise AssertionError(name)\n"
        "warnings.simplefilter('ignore')\n"
        "from recyc_jax import pretrained; from eval import documents; pretrained.load_params, documents.load\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


EXTRAS = {
    "recyc_jax": (),
    "recyc_jax.commands": ("eval", "train"),
    "recyc_jax.serve": ("serve",),
    "eval": ("eval",),
    "train": ("train", "tensorboard"),
}
OPTIONAL = {
    "eval.peer": {"torch"},
    "eval.harness": {"lm_eval", "tqdm"},
    "train.metrics": {"wandb"},
}  # commands that say themselves what they lack


def test_third_party_modules_are_declared():
    """What a package imports is in the dependencies of the installation that README names for it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {"": project["dependencies"], **project["optional-dependencies"]}

    def distributions(extra):
        return {re.match(r"[\w-]+", requirement)[0].lower().replace("_", "-") for requirement in extras[extra]}

    providers = importlib.metadata.packages_distributions()
    for package, allowed in EXTRAS.items():
        declared = distributions("") | set().union(*map(distributions, allowed))
        for name, path in modules(package.replace(".", "/")):
            if package == "recyc_jax" and name.startswith(("recyc_jax.commands", "recyc_jax.serve")):
                continue
            optional = set().union(*(some for of, some in OPTIONAL.items() if name.startswith(of)))
            for top in imported_tops(path) - set(sys.stdlib_module_names) - {"recyc_jax", "eval", "train"} - optional:
                provided_by = {one.lower().replace("_", "-") for one in providers.get(top, ())}
                assert provided_by & declared, f"{name} imports {top}, which {package}'s installation does not bring"


def imported_tops(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found
