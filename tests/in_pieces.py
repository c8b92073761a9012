"""The plain functions, wanting what the TPU's kernels want: slots last in memory, and copies that are read in pieces."""

from recyc_jax.attention.reference import *  # noqa: F403

SLOTS_LAST = True
COPIES = True
