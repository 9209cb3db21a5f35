"""Claims as lines for the terminal and as a CSV beside the page."""

import csv
import io
import textwrap
from collections.abc import Sequence

from dcr.report import claims
from dcr.report.finding import ABSENT, CLAIMS, Finding
from dcr.report.markup import plain_cell

FILE = "claims.csv"
RULE = (
    "A claim holds where its whole 95% bootstrap interval over prompts lies on the claimed side of "
    "the boundary, 0; it does not hold where the interval lies on the other side, and is undecided "
    "where the interval contains the boundary. Of two means one exceeds the other where their "
    "intervals do not meet."
)
HEADER = ("claim", "verdict", "run", "model", "params", "estimate", "low", "high", "boundary",
          "claimed_side", "beside", "beside_estimate", "beside_low", "beside_high", "source",
          "sentence", "command")  # fmt: skip


def by_claim(found: Sequence[Finding]) -> list[tuple[str, list[Finding]]]:
    """Each claim's words with its findings."""
    return [
        (title, [finding for finding in found if finding.claim == claim])
        for claim, title in CLAIMS.items()
        if any(finding.claim == claim for finding in found)
    ]


def lines(found: Sequence[Finding], width: int) -> list[str]:
    """For the terminal, folded to its width."""
    longest = max(map(len, (claims.HOLDS, claims.FAILS, claims.OPEN, ABSENT)))
    told = ["", "Claims of the paper", *textwrap.wrap(RULE, width)]
    for title, own in by_claim(found):
        told += ["", *textwrap.wrap(title, width)]
        for finding in own:
            told += textwrap.wrap(
                f"  {finding.verdict.ljust(longest)}  {finding.sentence}",
                width,
                subsequent_indent=" " * (longest + 4),
                break_long_words=False,
                break_on_hyphens=False,
            )
    return told


def csv_text(found: Sequence[Finding]) -> str:
    """One finding a row, in full precision."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(HEADER)
    for finding in found:
        writer.writerow(map(_cell, _row(finding)))
    return buffer.getvalue()


def _row(finding: Finding) -> tuple[object, ...]:
    measured, beside = finding.measured, finding.beside
    side = "above" if finding.above else "below"
    return (
        finding.claim, finding.verdict, finding.run, finding.model, finding.params,
        *(vars(measured).values() if measured else ("",) * 3),
        *((0, side) if measured else ("", "")),
        *((beside[0], *vars(beside[1]).values()) if beside else ("",) * 4),
        finding.source, finding.sentence, finding.command,
    )  # fmt: skip


def _cell(value: object) -> object:
    if isinstance(value, str):
        return plain_cell(value)
    return "" if value != value else value  # not a number
