"""Kernels, by platform. `implementations.py` finds them by name."""
