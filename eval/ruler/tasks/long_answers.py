"""Tasks of our own with answers of some hundred tokens, where decoding takes most of the time and what a method keeps
must follow the answer: a path along one-way roads, records in reverse order, and many needles.

They are no part of RULER. A reference's place in the list of references is its place in the answer, so the report can
score by position."""

from __future__ import annotations

import itertools
import random

from eval.ruler.tasks.base import Draft, Task
from eval.ruler.tasks.niah import Kind, Niah

ITEMS = 40
"""The items of an answer."""


class LongPath(Task):
    """Follow one-way roads for 40 steps; each step names the next place. `size` is the number of roads. Every place has
    one road from it, and all roads are in one chain, of which the path is a part."""

    new_tokens = 832

    TEMPLATE = (
        "The following is a list of one-way roads between places. Memorize it. I will ask you to follow the roads"
        " afterwards.\n{context}\nQuestion: Start at {start} and follow the roads for {count} steps. Which road do you"
        " take at each step?"
    )
    ROAD = "From {here} the road goes to {there}."

    @property
    def step(self) -> int:
        return 10

    @property
    def smallest(self) -> int:
        return ITEMS

    def draft(self, size: int, rng: random.Random, index: int) -> Draft:
        places = _names(self, size + 1, rng)
        roads = [self.ROAD.format(here=here, there=there) for here, there in itertools.pairwise(places)]
        rng.shuffle(roads)
        first = rng.randint(0, size - ITEMS)
        start = places[first]
        return Draft(
            self.TEMPLATE.format(context="\n".join(roads), start=start, count=ITEMS),
            f" Answer: From {start} the road goes to",
            tuple(places[first + 1 : first + 1 + ITEMS]),
        )


class LongReverse(Task):
    """Write 40 numbered records in reverse order. `size` is the number of records."""

    new_tokens = 832

    TEMPLATE = (
        "The following is a numbered list of records. Memorize it. I will ask you to write down some of them"
        " afterwards.\n{context}\nQuestion: Write down the records from number {last} down to number {first}, the last"
        " one first, each as it is in the list."
    )
    RECORD = "Record {number}: {name} {value}."

    @property
    def step(self) -> int:
        return 10

    @property
    def smallest(self) -> int:
        return ITEMS

    def draft(self, size: int, rng: random.Random, index: int) -> Draft:
        names = _names(self, size, rng)
        values = [str(rng.randint(1000000, 9999999)) for _ in names]
        lines = [
            self.RECORD.format(number=number, name=name, value=value)
            for number, (name, value) in enumerate(zip(names, values, strict=True), start=1)
        ]
        last = rng.randint(ITEMS, size)
        return Draft(
            self.TEMPLATE.format(context="\n".join(lines), first=last - ITEMS + 1, last=last),
            f" Answer: Record {last}:",
            tuple(reversed(values[last - ITEMS : last])),
        )


class LongNeedles(Niah):
    """Thirty-two needles in essays, all asked for in one question. `size` is the number of essay words."""

    new_tokens = 832

    @classmethod
    def kind_of(cls, name: str) -> Kind:
        return Kind("essay", num_keys=32, num_queries=32)

    def answer_prefix(self, prefix: str, plural: str, query: str, asked: list[str]) -> str:
        first = self._needle(asked[0], "").removesuffix(" .")
        return f" Here they are, in this order. {first}"


def _names(task: Task, count: int, rng: random.Random) -> list[str]:
    """Distinct names of two words."""
    words = task.material.words
    found: dict[str, None] = {}
    while len(found) < count:
        found[f"{rng.choice(words.adjectives)}-{rng.choice(words.nouns)}"] = None
    return list(found)


LONG_TASKS: dict[str, type[Task]] = {
    "long_path": LongPath,
    "long_reverse": LongReverse,
    "long_needles": LongNeedles,
}
