"""RULER under several decoding policies: `python -m eval.ruler`."""
