"""Question answering among documents: SQuAD 2.0 (qa_1) and HotpotQA (qa_2)."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from eval.ruler.tasks.base import Draft, Material, Prompting, Task
from recyc_jax.commands.text_files import whole

TEMPLATE = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "The following are given documents.\n\n{context}\n\nAnswer the question based on the given documents. Only give me the"
    " answer and do not output any other words.\n\nQuestion: {query}"
)
ANSWER_PREFIX = " Answer:"
DOCUMENT = "Document {number}:\n{text}"


@dataclasses.dataclass(frozen=True)
class Question:
    """A question, its accepted answers, and indices of documents: `gold` must be in the context, `related` are added
    first."""

    text: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    related: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class QuestionSet:
    """Questions in the order of the file, over distinct sorted documents."""

    documents: tuple[str, ...]
    questions: tuple[Question, ...]


def read_squad(data: Any) -> QuestionSet:
    """The questions of SQuAD 2.0's file without the unanswerable ones. Related documents are the rest of the article.
    Raises ValueError or KeyError for another layout."""
    articles = [article["paragraphs"] for article in data["data"]]
    documents = sorted({_text(paragraph["context"]) for article in articles for paragraph in article})
    number = {text: at for at, text in enumerate(documents)}
    questions = []
    for article in articles:
        article_documents = [number[paragraph["context"]] for paragraph in article]
        for paragraph, own in zip(article, article_documents, strict=True):
            related = tuple(other for other in article_documents if other != own)
            for qa in paragraph["qas"]:
                if not qa["is_impossible"]:
                    answers = tuple(_text(answer["text"]) for answer in qa["answers"])
                    if not answers:
                        raise ValueError(f"the answerable question {qa['question']!r} has no answers")
                    questions.append(Question(_text(qa["question"]), answers, (own,), related))
    return QuestionSet(tuple(documents), tuple(questions))


def read_hotpot(data: Any) -> QuestionSet:
    """The questions of HotpotQA's distractor file. All ten documents of a question are gold. Raises ValueError or
    KeyError for another layout."""
    texts = [[whole(f"{title}\n{''.join(sentences)}") for title, sentences in row["context"]] for row in data]
    documents = sorted({text for row in texts for text in row})
    number = {text: at for at, text in enumerate(documents)}
    questions = [
        Question(_text(row["question"]), (_text(row["answer"]),), tuple(number[text] for text in own), ())
        for row, own in zip(data, texts, strict=True)
    ]
    return QuestionSet(tuple(documents), tuple(questions))


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{value!r} stands where a text should")
    return whole(value)


class QuestionAnswering(Task):
    """`size` is the number of documents. Sample i asks question i of the file."""

    new_tokens = 32
    metric = "part"

    def __init__(self, name: str, material: Material, prompting: Prompting, length: int, seed: int) -> None:
        super().__init__(name, material, prompting, length, seed)
        questions = material.squad if name == "qa_1" else material.hotpot
        if questions is None:
            raise ValueError(f"{name} needs its official file")
        self.set: QuestionSet = questions

    @property
    def step(self) -> int:
        return 10

    @property
    def smallest(self) -> int:
        return max(len(question.gold) for question in self.set.questions[:1])

    def draft(self, size: int, rng: random.Random, index: int) -> Draft:
        if index >= len(self.set.questions):
            raise ValueError(f"{self.name} has {len(self.set.questions)} questions; sample {index} does not exist")
        question = self.set.questions[index]
        chosen = [self.set.documents[at] for at in self._choose(question, max(size, len(question.gold)), rng)]
        random.Random(self.seed).shuffle(chosen)
        context = "\n\n".join(DOCUMENT.format(number=at, text=text) for at, text in enumerate(chosen, 1))
        return Draft(TEMPLATE.format(context=context, query=question.text), ANSWER_PREFIX, question.answers)

    def _choose(self, question: Question, size: int, rng: random.Random) -> list[int]:
        """Indices of the gold documents, then of related ones, then of random others; if `size` exceeds the corpus, the
        whole corpus, repeated."""
        total = len(self.set.documents)
        if size >= total:
            return (list(range(total)) * (-(-size // total)))[:size]
        more = size - len(question.gold)
        if more <= len(question.related):
            return [*question.gold, *rng.sample(question.related, more)]
        chosen = [*question.gold, *question.related]
        others = sorted(set(range(total)) - set(chosen))
        return chosen + rng.sample(others, size - len(chosen))
