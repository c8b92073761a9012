"""Makes `python -m eval.NAME` and `python -m train.NAME` run this project's command in any folder.

Python looks into the current folder first, so an `eval.py` or a `train/` there hides the whole package of that name.
`recyc_jax_startup.pth`, which lies in site-packages, has this module imported whenever Python is started with `-m`. It acts
only if NAME is a command of this project that no folder earlier in the search has too. In that process alone, both `eval`
and `train` are this project's then: a deprecated command of `eval` imports `train`. This module lies outside `recyc_jax`,
whose import would slow down every such start.
"""

import itertools
import os
import sys
from importlib.machinery import PathFinder

HERE = os.path.dirname(os.path.abspath(__file__))
PACKAGES = ("eval", "train")


class Finder:
    """Finds this project's packages before the search through sys.path; put first on sys.meta_path."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, [HERE]) if name in PACKAGES else None


def module_asked_for(argv, orig_argv):
    """NAME of `python -m NAME`, or "". While Python starts, sys.argv is "-m" and what follows NAME; the word before that
    in sys.orig_argv is NAME, or ends with it, as in `python -umNAME`."""
    if argv[:1] != ["-m"]:
        return ""
    word = orig_argv[-len(argv)]
    return word.partition("m")[2] if word.startswith("-") else word


def has_command(folder, name):
    base = os.path.join(folder, *name.split("."))
    return os.path.isfile(base + ".py") or os.path.isfile(os.path.join(base, "__main__.py"))


def is_ours(name, search):
    """Whether `name` is a command of this project, and no folder of `search` before this project's has one of that name."""
    if name.partition(".")[0] not in PACKAGES or not has_command(HERE, name):
        return False
    return not any(has_command(folder, name) for folder in itertools.takewhile(lambda folder: folder != HERE, search))


def install():
    # the current folder, "" here, comes onto sys.path after this, unless -P, -I or PYTHONSAFEPATH keeps it away
    current = () if sys.flags.safe_path else ("",)
    if is_ours(module_asked_for(sys.argv, sys.orig_argv), (*current, *sys.path)):
        sys.meta_path.insert(0, Finder)


install()
