"""Figures beside each other, and who has the better one."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

OURS = "Mend"
VARIANT = "Mend, SciPy"
NOT_RUN = "not run"
Value = float | int | str
"""A figure, or what happened instead."""


@dataclass(frozen=True)
class Row:
    """One figure of everybody who has it."""

    case: str
    what: str
    values: Mapping[str, Value]
    ideal: float | str = 0.0
    within: float = 0.0
    """How far from the ideal ours may be; for speeds the goal in seconds."""
    unit: str = ""
    note: str = ""

    def miss(self, name: str) -> float:
        """How far a contestant is from the ideal; infinite where an error came instead of a figure."""
        value = self.values[name]
        if isinstance(value, str) or isinstance(self.ideal, str):
            return 0.0 if value == self.ideal else float("inf")
        return abs(value - self.ideal)

    @property
    def peers(self) -> list[str]:
        return [name for name in self.values if name not in (OURS, VARIANT)]

    @property
    def reached(self) -> bool:
        """Ours keeps the goal."""
        # an exact goal is meant exactly, a bound as it is printed
        return OURS in self.values and self.miss(OURS) <= self.within

    @property
    def best_peer(self) -> str | None:
        return min(self.peers, key=self.miss, default=None)

    @property
    def verdict(self) -> str:
        if OURS not in self.values:
            return NOT_RUN
        goal = "reached" if self.reached else "MISSED"
        if self.best_peer is None:
            return f"{goal}, no peer has it"
        ours, theirs = self.miss(OURS), self.miss(self.best_peer)
        if self.unit == "s" and theirs < float("inf"):
            return (
                f"{goal}, {theirs / ours:.3g}x as fast" if ours <= theirs else f"{goal}, BEHIND ({ours / theirs:.3g}x)"
            )
        return f"{goal}, " + ("better" if ours < theirs else "as good" if ours == theirs else "BEHIND")

    @property
    def good(self) -> bool:
        return self.reached and "BEHIND" not in self.verdict


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [{**asdict(row), "best_peer": row.best_peer, "verdict": row.verdict} for row in rows]


def draw(rows: Sequence[Row], names: Sequence[str]) -> str:
    """The table as text: a block for each case, a line for each figure, a column for each contestant.

    * marks the best peer.
    """
    shown = [name for name in names if any(name in row.values for row in rows)]
    widths = [max(11, *(len(word) for word in name.split())) for name in shown]
    label = max(len(row.what) for row in rows) + 2
    heads = [textwrap.wrap(name, width) for name, width in zip(shown, widths, strict=True)]
    lines = []
    for level in range(max(map(len, heads))):
        cells = [head[level] if level < len(head) else "" for head in heads]
        lines.append(_line("", label, cells, widths, "" if level else "goal"))
    case = ""
    for row in rows:
        if row.case != case:
            case = row.case
            lines += ["", case]
        cells = [_format(row.values.get(name), row.unit) + " *"[name == row.best_peer] for name in shown]
        lines.append(_line("  " + row.what, label, cells, widths, f"{_goal(row):<16}{row.verdict}"))
        if row.note:
            lines.append(f"      {row.note}")
    return "\n".join(lines)


def _line(what: str, label: int, cells: Sequence[str], widths: Sequence[int], end: str) -> str:
    columns = "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
    return f"{what:<{label}}  {columns}   {end}".rstrip()


def _goal(row: Row) -> str:
    if isinstance(row.ideal, str):
        return row.ideal
    if row.unit == "s":
        return f"< {row.within:g} s"
    return f"{row.ideal:g}" + (f" +- {row.within:g}" if row.within else "")


def _format(value: Value | None, unit: str) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if unit == "s":
        return f"{value:.3f}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
