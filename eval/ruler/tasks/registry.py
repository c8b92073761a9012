"""The tasks by name: RULER's, and our own with long answers."""

from __future__ import annotations

from eval.ruler.tasks.base import Task
from eval.ruler.tasks.cwe import CommonWords
from eval.ruler.tasks.fwe import FrequentWords
from eval.ruler.tasks.long_answers import LONG_TASKS
from eval.ruler.tasks.niah import KINDS, Niah
from eval.ruler.tasks.qa import QuestionAnswering
from eval.ruler.tasks.vt import VariableTracking

RULER_TASKS: dict[str, type[Task]] = {
    **dict.fromkeys(KINDS, Niah),
    "vt": VariableTracking,
    "cwe": CommonWords,
    "fwe": FrequentWords,
    "qa_1": QuestionAnswering,
    "qa_2": QuestionAnswering,
}
TASKS = RULER_TASKS | LONG_TASKS
ESSAY_TASKS = frozenset(name for name, kind in KINDS.items() if kind.haystack == "essay") | {"long_needles"}
