"""The tasks by name."""

from __future__ import annotations

from eval.tasks.base import Task
from eval.tasks.cwe import CommonWords
from eval.tasks.fwe import FrequentWords
from eval.tasks.niah import KINDS, Niah
from eval.tasks.qa import QuestionAnswering
from eval.tasks.vt import VariableTracking

TASKS: dict[str, type[Task]] = {
    **dict.fromkeys(KINDS, Niah),
    "vt": VariableTracking,
    "cwe": CommonWords,
    "fwe": FrequentWords,
    "qa_1": QuestionAnswering,
    "qa_2": QuestionAnswering,
}
ESSAY_TASKS = frozenset(name for name, kind in KINDS.items() if kind.haystack == "essay")
