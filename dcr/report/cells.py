"""The cells, rows and sections that tables on the page and in the terminal are made of."""

from collections.abc import Sequence
from dataclasses import dataclass

from dcr.statistics import Interval

IN_DISTRIBUTION, CONTAMINATED = "†", "‡"


@dataclass(frozen=True)
class Value:
    """One cell. `spread` is a standard deviation over seeds, or the standard error of a win rate.

    `text` stands in place of the number where a cell is no rate; `aside` is for the page only.
    """

    estimate: float
    low: float | None = None
    high: float | None = None
    spread: float | None = None
    percent: bool = True
    marked: bool = False
    contaminated: bool = False
    aside: str = ""
    text: str = ""

    @property
    def marks(self) -> str:
        known = IN_DISTRIBUTION if self.marked else ""
        return known + (CONTAMINATED if self.contaminated else "")


@dataclass(frozen=True)
class Row:
    """A set of prompts, or a summary over sets, with one value a column."""

    label: str
    values: tuple[Value | None, ...]
    summary: bool = False
    page_only: bool = False
    aside: str = ""


@dataclass(frozen=True)
class Section:
    title: str
    short: str
    rows: list[Row]


def words(text: str, aside: str = "") -> Value:
    """A cell that holds words."""
    return Value(0.0, text=text, aside=aside)


def percents(interval: Interval) -> str:
    """`67.0% [57.3–75.4]`."""
    estimate, low, high = (100 * end for end in (interval.estimate, interval.low, interval.high))
    return f"{estimate:.1f}% [{low:.1f}–{high:.1f}]"


def text_of(value: Value | None, digits: int = 0) -> str:
    """A cell in words: percents with a decimal, their intervals with `digits`, others with two."""
    if value is None:
        return "–"
    if value.text:
        return value.text + value.marks
    scale, places, ends = (100, 1, digits) if value.percent else (1, 2, 2)
    text = f"{scale * value.estimate:.{places}f}"
    if value.spread is not None:
        text += f" ± {scale * value.spread:.{places}f}"
    elif value.low is not None and value.high is not None:
        low, high = (f"{scale * end:.{ends}f}" for end in (value.low, value.high))
        if not value.percent:  # .61 for 0.61: one more column fits a terminal
            low, high = low.removeprefix("0"), high.removeprefix("0")
        text += f" [{low}–{high}]"
    return text + value.marks


def any_marked(table: Sequence[Section], mark: str, *, in_terminal: bool = False) -> bool:
    """Whether a cell of the table bears the mark, so that it needs its footnote."""
    return any(
        value is not None and mark in value.marks
        for section in table
        for row in section.rows
        if not (in_terminal and row.page_only)
        for value in row.values
    )
