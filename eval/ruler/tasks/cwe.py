"""Common words extraction: ten words that appear often in a numbered list, after a worked example."""

from __future__ import annotations

import random

from eval.ruler.tasks.base import Draft, Material, Prompting, Task

TEMPLATE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear"
    " most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
)
ANSWER_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
COMMON = 10


class CommonWords(Task):
    """`size` is the number of distinct words."""

    new_tokens = 120

    def __init__(self, name: str, material: Material, prompting: Prompting, length: int, seed: int) -> None:
        super().__init__(name, material, prompting, length, seed)
        words = material.words
        self._pool = sorted({*words.nouns, *words.adjectives, *words.verbs})
        random.Random(seed).shuffle(self._pool)
        short = length < 4096
        self._repeats = (6, 1) if short else (30, 3)
        self._example_words, self._example_repeats = (20, (3, 1)) if short else (40, (10, 3))

    @property
    def step(self) -> int:
        return 10

    @property
    def smallest(self) -> int:
        return COMMON + 1  # one uncommon word

    @property
    def largest(self) -> int:
        return len(self._pool)

    def _search(self) -> int:
        size = super()._search()
        if size == self.largest:
            raise ValueError(f"cwe at length {self.length} needs more distinct words than the {size} of the word lists")
        return size

    def draft(self, size: int, rng: random.Random, index: int) -> Draft:
        example, example_answer = self._problem(self._example_words, *self._example_repeats, rng)
        body, answer = self._problem(size, *self._repeats, rng)
        solved = " ".join(f"{number}. {word}" for number, word in enumerate(example_answer, 1))
        return Draft(f"{example}{ANSWER_PREFIX} {solved}\n{body}", ANSWER_PREFIX, answer)

    def _problem(self, size: int, often: int, rarely: int, rng: random.Random) -> tuple[str, tuple[str, ...]]:
        words = rng.sample(self._pool, size)
        listed = words[:COMMON] * often + words[COMMON:] * rarely
        random.Random(self.seed).shuffle(listed)
        context = " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1))
        return TEMPLATE.format(context=context), tuple(words[:COMMON])
