"""Selection rules that were compared with look-ahead: `python -m eval.ideas`."""
