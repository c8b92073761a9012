"""Scores as NVIDIA/RULER computes them, and their summary."""

import math

import pytest

from eval.ruler import report, scoring


@pytest.mark.parametrize(
    ("prediction", "references", "metric", "expected"),
    [
        ("the answer is 123 and 456", ["123", "456", "789", "000"], "all", 0.5),
        ("IDEAL", ["id"], "all", 1.0),  # no word boundaries
        ("nothing", ["x"], "all", 0.0),
        ("a, b", ["b", "a"], "all", 1.0),
        ("Paris", ["london", "paris"], "part", 1.0),
        ("Rome", ["london", "paris"], "part", 0.0),
        ("yesterday", ["yes"], "part", 1.0),
    ],
)
def test_score(prediction, references, metric, expected):
    assert scoring.score(prediction, references, metric) == expected


def test_clean():
    assert scoring.clean("  a\tb\x00c \n") == "a\nb\nc"
    assert scoring.clean("\x01\x02") == ""


def test_mean_and_error():
    mean, error = scoring.mean_and_error([0.0, 1.0, 1.0, 1.0])
    assert mean == 75.0
    assert error == pytest.approx(25.0)
    assert math.isnan(scoring.mean_and_error([1.0])[1])


def test_paired():
    gap, error = scoring.paired([1.0, 0.5, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0])
    assert gap == pytest.approx(-12.5)
    assert error == pytest.approx(12.5)  # the error of the differences, not of the two means
    assert scoring.mean_of_tasks([(50.0, 3.0), (70.0, 4.0)]) == (60.0, 2.5)


def test_summary():
    rows = [
        dict(
            policy=policy,
            task="vt",
            length=8,
            index=index,
            prediction=text,
            score=score,
            seconds=0.5,
            steps=9,
            full_steps=full,
        )
        for policy, index, text, score, full in (
            ("full", 0, "a", 1.0, 9.0),
            ("full", 1, "", 0.5, 9.0),
            ("other", 0, "b", 0.0, 1.5),
        )
    ]
    second, first = report.summarise(rows[::-1], ["other", "full"])  # in the order of the policies, not of the rows
    assert first == dict(
        policy="full",
        task="vt",
        length=8,
        score=75.0,
        n=2,
        stderr=25.0,
        difference=0.0,
        difference_stderr=0.0,
        effective_stride=1.0,
        steps=18,
        nulls=1,
        seconds=1.0,
    )
    assert second["stderr"] is None
    assert second["difference"] == -100.0  # from the only sample that both policies have
    assert second["effective_stride"] == 6.0
