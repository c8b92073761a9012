"""Time of each kernel in a decode step: `python -m eval.waterfall`."""
