"""Tables that fit a terminal of 80 columns, and Markdown tables: columns name policies by letters, and a legend below
the table explains the letters."""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from recyc_jax.commands import numbers


def number(value: float, digits: int = 2) -> float | None:
    """`value`, rounded; None if it is not finite, because JSON has neither NaN nor infinity."""
    return numbers.finite(value, digits)


def ordered(rows: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    """The distinct values of the field `name`, in order of appearance."""
    return list(dict.fromkeys(row[name] for row in rows))


def letters(policies: Sequence[str]) -> dict[str, str]:
    """A letter for each policy: A to Z, then A2, B2, ..."""
    alphabet = string.ascii_uppercase
    names = (
        alphabet[place % len(alphabet)] + ("" if place < len(alphabet) else str(place // len(alphabet) + 1))
        for place in range(len(policies))
    )
    return dict(zip(policies, names, strict=True))


def markdown_table(heading: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table; the first column is left-aligned, the others right-aligned."""
    rule = ["---"] + ["---:"] * (len(heading) - 1)
    return ["| " + " | ".join(row) + " |" for row in (heading, rule, *body)]


def markdown_legend(named: Mapping[str, str]) -> list[str]:
    """The lines of the legend that explains the letters of policies."""
    return [f"- {letter}: `{policy}`" for policy, letter in named.items()]


def print_table(
    title: str,
    heading: Sequence[str],
    body: Sequence[Sequence[str]],
    named: Mapping[str, str],
    keys: int = 1,
    last_apart: bool = False,
) -> None:
    """Print the table, and below it the policies that its letters stand for. A table that is too wide for the terminal
    is split into several, each with the first `keys` columns. `last_apart` draws a line above the last row."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for columns in _blocks(heading, body, keys, console.width):
        table = Table(title=title)
        for column in columns:
            table.add_column(heading[column], justify="left" if column < keys else "right", no_wrap=True)
        for row in body:
            table.add_row(*(row[column] for column in columns), end_section=last_apart and row is body[-2])
        console.print(table)
    for policy, letter in named.items():
        console.print(f"{letter}  {policy}", highlight=False, soft_wrap=True)


def _blocks(heading: Sequence[str], body: Sequence[Sequence[str]], keys: int, width: int) -> Iterator[list[int]]:
    """The columns of each of the tables that fit into `width`: the `keys` first columns, then some of the others."""
    widths = [max(len(row[column]) for row in (heading, *body)) + 3 for column in range(len(heading))]
    begin = list(range(keys))
    taken, used = list(begin), sum(widths[:keys]) + 1
    for column in range(keys, len(heading)):
        if used + widths[column] > width and len(taken) > keys:
            yield taken
            taken, used = list(begin), sum(widths[:keys]) + 1
        taken.append(column)
        used += widths[column]
    yield taken
