"""Time of a decode step, measured or estimated: `python -m eval.speed`."""
