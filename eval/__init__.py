"""Evaluation of decoding policies."""
