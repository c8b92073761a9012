"""Needle in a haystack: eight tasks that differ in the haystack and in types and numbers of keys, values, queries."""

from __future__ import annotations

import dataclasses
import functools
import random
import uuid

from eval.ruler.tasks.base import Draft, Material, Prompting, Task

TEMPLATE = (
    "Some special magic {type} are hidden within the following text. Make sure to memorize it. I will quiz you about the"
    " {type} afterwards.\n{context}\nWhat are all the special magic {type} for {query} mentioned in the provided text?"
)
ANSWER_PREFIX = " The special magic {type} for {query} mentioned in the provided text are"
NEEDLE = "One of the special magic {type} for {key} is: {value}."
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_DEPTHS = tuple(round(100 * number / 39) for number in range(40))  # percent


@dataclasses.dataclass(frozen=True)
class Kind:
    """The parameters of one task."""

    haystack: str  # noise, essay or needle
    keys: str = "words"  # words or uuids
    values: str = "numbers"  # numbers or uuids
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1


KINDS = {
    "niah_single_1": Kind("noise"),
    "niah_single_2": Kind("essay"),
    "niah_single_3": Kind("essay", values="uuids"),
    "niah_multikey_1": Kind("essay", num_keys=4),
    "niah_multikey_2": Kind("needle"),
    "niah_multikey_3": Kind("needle", keys="uuids", values="uuids"),
    "niah_multivalue": Kind("essay", num_values=4),
    "niah_multiquery": Kind("essay", num_keys=4, num_queries=4),
}


class Niah(Task):
    """`size` is the number of essay words, noise lines or distractor needles."""

    new_tokens = 128

    def __init__(self, name: str, material: Material, prompting: Prompting, length: int, seed: int) -> None:
        super().__init__(name, material, prompting, length, seed)
        self.kind = self.kind_of(name)
        self._sentences = functools.lru_cache(maxsize=4)(self._split)

    @classmethod
    def kind_of(cls, name: str) -> Kind:
        """The parameters of the task of that name."""
        return KINDS[name]

    @property
    def step(self) -> int:
        if self.length < 4096:  # ours: the reference's 500 words are up to 60% of a sample of 1024 tokens
            return max(5, self.length // 40) if self.kind.haystack == "essay" else 5
        return 500 if self.kind.haystack == "essay" else 25

    @property
    def smallest(self) -> int:
        return {"essay": 50, "noise": 5, "needle": 1}[self.kind.haystack]  # ours: enough to hide the needles in

    def draft(self, size: int, rng: random.Random, index: int) -> Draft:
        kind = self.kind
        keys = self._distinct(kind.keys, kind.num_keys, rng)
        values = {key: [self._draw(kind.values, rng) for _ in range(kind.num_values)] for key in keys}
        needles = [self._needle(key, value) for key in keys for value in values[key]]
        random.Random(self.seed).shuffle(needles)  # the same permutation in every sample, as in the reference
        context = self._hide(needles, size, rng)
        asked = rng.sample(keys, kind.num_queries)
        query = ", ".join(asked[:-1]) + f", and {asked[-1]}" if len(asked) > 1 else asked[0]
        template, prefix, plural = TEMPLATE, ANSWER_PREFIX, kind.values
        if kind.num_queries * kind.num_values == 1:
            template, prefix, plural = _singular(template), _singular(prefix), plural[:-1]
        return Draft(
            template.format(type=plural, context=context, query=query),
            self.answer_prefix(prefix, plural, query, asked),
            tuple(value for key in asked for value in values[key]),
        )

    def answer_prefix(self, prefix: str, plural: str, query: str, asked: list[str]) -> str:
        """The beginning of the answer. `asked` are the keys, in the order of the question."""
        return prefix.format(type=plural, query=query)

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(type=self.kind.values, key=key, value=value)

    def _draw(self, what: str, rng: random.Random) -> str:
        if what == "numbers":
            return str(rng.randint(1000000, 9999999))
        if what == "uuids":
            return str(uuid.UUID(int=rng.getrandbits(128), version=4))
        words = self.material.words
        return f"{rng.choice(words.adjectives)}-{rng.choice(words.nouns)}"

    def _distinct(self, what: str, count: int, rng: random.Random) -> list[str]:
        found: dict[str, None] = {}
        while len(found) < count:
            found[self._draw(what, rng)] = None
        return list(found)

    def _hide(self, needles: list[str], size: int, rng: random.Random) -> str:
        if self.kind.haystack == "essay":
            return self._hide_in_essay(needles, size, rng)
        if self.kind.haystack == "noise":
            lines = [NOISE] * size
            places = sorted(rng.sample(range(size), len(needles)), reverse=True)
        else:
            drawn = ((self._draw(self.kind.keys, rng), self._draw(self.kind.values, rng)) for _ in range(size))
            lines = [self._needle(key, value) for key, value in drawn]
            places = [rng.randint(0, size)]
        for place, needle in zip(places, needles, strict=True):  # from the back, so that earlier places stay valid
            lines.insert(place, needle)
        return "\n".join(lines)

    def _hide_in_essay(self, needles: list[str], size: int, rng: random.Random) -> str:
        sentences = self._sentences(size)
        cuts = [int(len(sentences) * depth / 100) for depth in sorted(rng.sample(_DEPTHS, len(needles)))]
        pieces, last = [], 0
        for cut, needle in zip(cuts, needles, strict=True):
            pieces += [" ".join(sentences[last:cut]), needle]
            last = cut
        return " ".join([*pieces, " ".join(sentences[last:])])

    def _split(self, size: int) -> list[str]:
        essays = self.material.essays
        if essays is None:
            raise ValueError(f"{self.name} needs essays: pass --essays PATH")
        repeats = -(-size // len(essays.words))
        return essays.sentences(" ".join((essays.words * repeats)[:size]))


def _singular(text: str) -> str:
    """The plural template, rewritten for a single value as in the reference."""
    for plural, single in (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer")):
        text = text.replace(plural, single)
    return text
