"""Variable tracking: one chain of five assignments among noise lines, after a worked example."""

from __future__ import annotations

import itertools
import random
import string

from eval.ruler.tasks.base import Draft, Task
from eval.ruler.tasks.niah import NOISE

TEMPLATE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {query} in the text above."
)
ANSWER_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the"
    " value {query}, they are: "
)
VARIABLES = 5  # one chain of four hops
_EXAMPLE_TOKENS = 500
_EXAMPLE_STEP = 5


class VariableTracking(Task):
    """`size` is the number of noise lines."""

    new_tokens = 30

    @property
    def step(self) -> int:
        return 10 if self.length >= 4096 else 5

    @property
    def smallest(self) -> int:
        return VARIABLES

    def draft(self, size: int, rng: random.Random, index: int) -> Draft:
        body, prefix, names = self._problem(size, 5, rng, rng)
        return Draft(f"{self._example(rng)}\n{body}", prefix, names)

    def _example(self, rng: random.Random) -> str:
        """A solved problem of at most 500 tokens; names and value differ between samples, the places do not."""
        if not hasattr(self, "_example_size"):
            self._example_size = self._fit_example()
        body, prefix, names = self._problem(self._example_size, 3, rng, self.rng("example"))
        return f"{body}{prefix} {' '.join(names)}\n"

    def _fit_example(self) -> int:
        best, size = _EXAMPLE_STEP, _EXAMPLE_STEP
        while True:
            body, prefix, names = self._problem(size, 3, self.rng("example", size), self.rng("example"))
            if self.prompting.count(f"{body}{prefix} {' '.join(names)}\n") > _EXAMPLE_TOKENS:
                return best
            best, size = size, size + 1

    def _problem(
        self, size: int, name_length: int, rng: random.Random, place_rng: random.Random
    ) -> tuple[str, str, tuple[str, ...]]:
        names: dict[str, None] = {}
        while len(names) < VARIABLES:
            names["".join(rng.choices(string.ascii_uppercase, k=name_length))] = None
        chain = list(names)
        value = str(rng.randrange(10000, 99999))
        # the reference has the trailing space of copies, too
        statements = [f"VAR {chain[0]} = {value}"]
        statements += [f"VAR {name} = VAR {before} " for before, name in itertools.pairwise(chain)]
        lines = [NOISE] * size
        places = sorted(place_rng.sample(range(size), VARIABLES))
        for place, statement in reversed(list(zip(places, statements, strict=True))):
            lines.insert(place, statement)
        body = TEMPLATE.format(context="\n".join(lines), query=value)
        return body, ANSWER_PREFIX.format(count=VARIABLES, query=value), tuple(chain)
