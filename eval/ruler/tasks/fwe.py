"""Frequent words extraction: the three most frequent of random words whose counts follow a zeta distribution."""

from __future__ import annotations

import math
import random
import string

from eval.ruler.tasks.base import Draft, Task

TEMPLATE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared"
    " coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three"
    " most frequently appeared words in the above coded text?"
)
ANSWER_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
_ZETA_2 = math.pi**2 / 6
_LETTERS = 6


class FrequentWords(Task):
    """`size` is the number of words of the coded text. The most frequent word is noise: '...'."""

    new_tokens = 50

    @property
    def _room(self) -> int:
        return self.length - self.new_tokens

    @property
    def step(self) -> int:
        return max(1, self._room // 32)

    @property
    def smallest(self) -> int:
        return 53  # below, the fourth and fifth rank may have equal counts, and the answer is not unique

    def _search(self) -> int:
        """As in the reference: grow in steps from a sixth of the available tokens while a sample is too short."""
        size = max(self.smallest, self._room // 6)
        while self._build(size, self.rng("size", size), 0).length < self.length:
            size += self.step
        return max(self.smallest, size - self.step)

    def draft(self, size: int, rng: random.Random, index: int) -> Draft:
        vocabulary: set[str] = set()
        while len(vocabulary) < max(4, self._room // 50):
            vocabulary.add("".join(rng.choices(string.ascii_lowercase, k=_LETTERS)))
        ranked = sorted(vocabulary)
        random.Random(self.seed).shuffle(ranked)
        ranked[0] = "..."
        text = [word for rank, word in enumerate(ranked, 1) for _ in range(int(size / rank**2 / _ZETA_2))]
        random.Random(self.seed).shuffle(text)
        return Draft(TEMPLATE.format(context=" ".join(text)), ANSWER_PREFIX, tuple(ranked[1:4]))
