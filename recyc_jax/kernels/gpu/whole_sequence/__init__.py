"""Recycled attention over whole sequences on NVIDIA GPUs, forward and backward."""
