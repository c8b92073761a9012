"""Selection rules that were compared with look-ahead: `python -m eval.ideas` is `eval.ruler` with more policies."""

from __future__ import annotations

import sys
from typing import Any


def main(args: list[str] | None = None) -> int:
    """Run `eval.ruler` with these policies added, and return its exit status."""
    from eval.ruler.__main__ import main as ruler

    return ruler(args, known=_policies)


def _policies() -> Any:
    from eval.ideas.rules import IDEAS
    from recyc_jax.policies.registry import POLICIES

    return POLICIES | IDEAS


if __name__ == "__main__":
    sys.exit(main())
