"""Inspection of traced programs."""


def equations(jaxpr):
    """The equations of a jaxpr, and those of all jaxprs nested in them."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (list, tuple)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)
