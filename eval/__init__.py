"""Commands that evaluate decoding policies: a package per command, run as `python -m eval.NAME`."""

import importlib
import warnings
from typing import Any

_MOVED = {
    "backend": "recyc_jax.commands.backends",
    "command": "recyc_jax.commands.command_line",
    "documents": "recyc_jax.commands.documents",
    "hosts": "recyc_jax.commands.hosts",
    "measuring": "recyc_jax.commands.measuring",
    "runlog": "recyc_jax.commands.run_log",
}


def __getattr__(name: str) -> Any:
    if name not in _MOVED:
        raise AttributeError(f"module 'eval' has no attribute {name!r}")
    warnings.warn(f"eval.{name} is deprecated: it is {_MOVED[name]} now", DeprecationWarning, stacklevel=2)
    return importlib.import_module(_MOVED[name])
