"""What the tasks share: samples, the search for a size that fits the total length, and the texts for generators."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import json
import random
import sys
from collections.abc import Callable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Sample:
    """One prompt and its reference answers."""

    index: int
    input: str  # the prompt in the model's template, without the answer prefix
    answer_prefix: str
    outputs: tuple[str, ...]
    length: int  # tokens of the prompt with answer prefix, plus the new tokens

    @property
    def prompt(self) -> str:
        return self.input + self.answer_prefix

    @property
    def digest(self) -> str:
        """12 hex digits of a SHA-256 of the prompt and the references."""
        return hashlib.sha256(json.dumps([self.prompt, self.outputs]).encode()).hexdigest()[:12]


@dataclasses.dataclass(frozen=True)
class Draft:
    """A sample without the model's template."""

    body: str
    answer_prefix: str
    outputs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Words:
    """Sorted word lists without duplicates."""

    nouns: tuple[str, ...]
    adjectives: tuple[str, ...]
    verbs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Essays:
    """Running prose, split into words, and a sentence splitter."""

    words: tuple[str, ...]
    sentences: Callable[[str], list[str]]


@dataclasses.dataclass(frozen=True)
class Material:
    """All texts for generators; texts that no task of the run needs may be missing."""

    words: Words
    essays: Essays | None = None
    squad: Any = None  # QuestionSet
    hotpot: Any = None  # QuestionSet


@dataclasses.dataclass(frozen=True)
class Prompting:
    """How bodies become prompts for a model, and how their tokens are counted."""

    wrap: Callable[[str], str]  # puts a body in the model's chat template; the identity for base models
    counts: Callable[[Sequence[str]], list[int]]  # tokens of each text, without special tokens

    def count(self, text: str) -> int:
        """The tokens of a text, without special tokens."""
        return self.counts([text])[0]


class Task(abc.ABC):
    """A generator of samples of one task at one total length."""

    new_tokens: int
    metric = "all"  # the metric of `scoring.score`: "all" or "part"

    def __init__(self, name: str, material: Material, prompting: Prompting, length: int, seed: int) -> None:
        self.name = name
        self.material, self.prompting, self.length, self.seed = material, prompting, length, seed
        self._size: int | None = None

    @property
    @abc.abstractmethod
    def step(self) -> int:
        """How much the size shrinks if a sample is too long."""

    @property
    def smallest(self) -> int:
        """The smallest size that makes a sample."""
        return 1

    @property
    def largest(self) -> int:
        """The largest size that there is material for."""
        return sys.maxsize

    @abc.abstractmethod
    def draft(self, size: int, rng: random.Random, index: int) -> Draft:
        """A sample whose context has `size` units."""

    def rng(self, *what: Any) -> random.Random:
        """A separate random stream for each (seed, task, length, what)."""
        return random.Random(":".join(map(str, (self.seed, self.name, self.length, *what))))

    def sample(self, index: int) -> Sample:
        """Sample `index`. Raises ValueError if the length is too short for the task."""
        size = self.size
        for attempt in self._shrinking(size):
            built = self._build(attempt, self.rng("sample", index), index)
            if built.length <= self.length:
                return built
        raise self._too_short(built.length)

    @property
    def size(self) -> int:
        """The size of all samples: the largest size that the search found to fit.

        As in the reference, the search builds one new sample for each size that it tries. Unlike the reference, it
        finds its upper bound by doubling instead of estimating it.
        """
        if self._size is None:
            self._size = self._search()
        return self._size

    def _search(self) -> int:
        def length(size: int) -> int:
            return self._build(size, self.rng("size", size), 0).length

        best = self.smallest
        low, high = best + 1, min(max(2 * best, self.step), self.largest + 1)  # high does not fit, or exceeds largest
        while high <= self.largest and length(high) <= self.length:
            best, low, high = high, high + 1, min(2 * high, self.largest + 1)
        while low < high:
            middle = (low + high) // 2
            if length(middle) <= self.length:
                best, low = middle, middle + 1
            else:
                high = middle
        return best

    def _shrinking(self, size: int) -> Sequence[int]:
        """The sizes to try: `size`, then one step less each time, then `smallest`. The reference loops forever once its
        size is a single step."""
        return [*range(size, self.smallest, -self.step), self.smallest]

    def _build(self, size: int, rng: random.Random, index: int) -> Sample:
        draft = self.draft(size, rng, index)
        text = self.prompting.wrap(draft.body)
        tokens = self.prompting.count(text + draft.answer_prefix)
        return Sample(index, text, draft.answer_prefix, draft.outputs, tokens + self.new_tokens)

    def _too_short(self, least: int) -> ValueError:
        return ValueError(
            f"length {self.length} is below the minimum of {self.name}: its smallest sample takes {least} tokens, "
            f"{self.new_tokens} of them for the answer"
        )
