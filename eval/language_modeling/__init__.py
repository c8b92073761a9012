"""Perplexity under several decoding policies: `python -m eval.language_modeling`."""
