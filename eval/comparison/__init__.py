"""Tables and figures over the rows of several RULER runs: `python -m eval.comparison`."""
