"""`python -m eval.harness`: the command line of the lm-evaluation-harness with the model `recyc_jax` in it.

Every flag is the harness's own; `--model recyc_jax` is the default:

    python -m eval.harness --model_args "pretrained=smollm2-135m,policy=lookahead:budget=1024;stride=50" --tasks TASK
"""

from __future__ import annotations

import sys


def main(args: list[str] | None = None) -> int:
    """Run the harness and return the exit status."""
    args = sys.argv[1:] if args is None else args
    try:
        import lm_eval.__main__ as harness
    except ImportError as error:
        print(f"error: {error.name} is missing: pip install 'recyc-jax[lm-eval]'", file=sys.stderr)
        return 2
    import eval.harness.model  # noqa: F401  # registers it

    runs = not args or args[0].startswith("-") or args[0] == "run"
    asks = {"-h", "--help"} & set(args)
    if runs and not asks and not any(arg == "--model" or arg == "-m" or arg.startswith("--model=") for arg in args):
        place = 1 if args[:1] == ["run"] else 0
        args = [*args[:place], "--model", "recyc_jax", *args[place:]]
    sys.argv = ["python -m eval.harness", *args]
    try:
        harness.cli_evaluate()
    except (ValueError, OSError, ImportError) as error:  # ImportError: of what a task needs
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
