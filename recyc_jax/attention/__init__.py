"""Attention over a KV cache, kept sets and selection, in plain JAX. Knows arrays, not policies or models."""
