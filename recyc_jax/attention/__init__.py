"""Attention over a KV cache, and the selection of its most attended slots. Knows arrays, not policies or models."""
