"""Pallas (Triton) kernels for NVIDIA GPUs."""
