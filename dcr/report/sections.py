"""The sections of a report in their order, for the page, the terminal and the files.

A section is a function from the chosen runs to a table, a grid, drawings or answers. Its docstring
is its heading, in the first line, and what stands below that on the page. Its path names it here,
and it is imported when it is made, so that help and a user's error load none of them.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dcr.core import extending

if TYPE_CHECKING:
    import pandas as pd

    from dcr.report.columns import Column, Group, Styles
    from dcr.report.figures import Drawing
    from dcr.report.records import Completions, RunRecord

TABLE_ENDINGS, FIGURE_ENDINGS = ("md", "csv", "tex", "html"), ("png", "svg", "csv")
OPERATING = "operating_points"
MARGIN = 2.0  # percentage points that a point of operating_points may be less safe than STL


@dataclass(frozen=True)
class Section:
    """A function and the places of its result, which is always on the page.

    A command asks for the section by `option`; without one it is always there. `endings` are those
    of its files. `folded` sections open by a click, and those `in_terminal` are also printed.
    """

    make: str | Callable[..., Any]  # module:function
    arguments: tuple[str, ...] = ()
    option: str = ""
    endings: tuple[str, ...] = ()
    folded: bool = False
    in_terminal: bool = False

    @property
    def function(self) -> Callable[..., Any]:
        return extending.ours(self.make) if isinstance(self.make, str) else self.make

    @property
    def words(self) -> tuple[str, str]:
        """The function's heading, and what stands below it."""
        heading, _, below = (inspect.getdoc(self.function) or "").partition("\n")
        return heading.removesuffix("."), " ".join(below.split())


def _table(make: str, *arguments: str) -> Section:
    return Section(make, arguments, "table", TABLE_ENDINGS)


def _figure(make: str, *arguments: str) -> Section:
    return Section(make, arguments, "figure", FIGURE_ENDINGS)


# the functions of its blocks
GENERAL = ("dcr.ability.section:accuracies", "dcr.quality.section:win_rates")
SECTIONS: dict[str, Section] = {
    "completions": Section("dcr.report.page:answers"),
    "runs": Section("dcr.report.page:overview"),
    "results": Section("dcr.report.tables:results", in_terminal=True),
    "recommended": Section("dcr.report.tables:recommended", folded=True),
    "outcomes": Section("dcr.report.outcomes:table", in_terminal=True),
    "outcome_bars": Section("dcr.report.outcomes:bars"),
    "calibrated": Section("dcr.report.tables:calibrated", in_terminal=True),
    "robustness": Section("dcr.robustness.section:table", in_terminal=True),
    "robustness_bars": Section("dcr.robustness.section:bars"),
    "thoughts": Section("dcr.thinking.section:table", in_terminal=True),
    "judges": Section("dcr.judges.section:judged", in_terminal=True),
    "agreement": Section("dcr.judges.section:agreement", in_terminal=True),
    "confusion": Section("dcr.judges.section:confusions", folded=True),
    "labels": Section("dcr.label.agreement:section", in_terminal=True),
    "general": Section("dcr.report.tables:general", GENERAL, in_terminal=True),
    "own": Section("dcr.report.tables:own_tasks", in_terminal=True),
    "contamination": Section("dcr.contamination:section", in_terminal=True),
    "table1": _table("dcr.report.paper:table1"),
    "table5": _table("dcr.report.paper:table5"),
    "discernment": _table("dcr.report.discernment:table"),
    "table2": _table("dcr.report.paper:costs"),
    "table3": _table("dcr.report.paper:ablation", "table3"),
    "table4": _table("dcr.report.paper:ablation", "table4"),
    "1a": _figure("dcr.report.curves:over_sft", "1a"),
    "1b": _figure("dcr.report.curves:over_sft", "1b"),
    "3": _figure("dcr.report.curves:over_sft", "3"),
    "4": _figure("dcr.report.trade_offs:checkpoints"),
    "5a": _figure("dcr.report.curves:over_sft", "5a"),
    "5b": _figure("dcr.report.curves:over_sft", "5b"),
    "6": _figure("dcr.analyses.drawings:kernel", "6"),
    "6a": _figure("dcr.analyses.drawings:kernel", "6a"),
    "6b": _figure("dcr.analyses.drawings:kernel", "6b"),
    "7": _figure("dcr.analyses.drawings:accuracies"),
    "8": _figure("dcr.analyses.drawings:scaling"),
    "9": _figure("dcr.report.curves:over_sft", "9"),
    OPERATING: _figure("dcr.report.operating:figure"),
    "claims": Section("dcr.analyses.verdicts:claims", (), "claims", ("csv",), in_terminal=True),
    "seeds": Section("dcr.report.tables:over_seeds", in_terminal=True),
    "trade-off": Section("dcr.report.trade_offs:trade_offs"),
    "paired": Section("dcr.report.comparisons:paired", in_terminal=True),
    "curves": Section("dcr.report.curves:training"),
    "ablations": Section("dcr.report.trade_offs:ablations"),
    "faults": Section("dcr.report.tables:faults", folded=True, in_terminal=True),
    "provenance": Section("dcr.report.page:evaluations"),
    "rows": Section("dcr.report.page:rows_used"),
    "configurations": Section("dcr.report.page:configurations"),
}
TABLES = tuple(name for name, section in SECTIONS.items() if section.option == "table")
FIGURES = tuple(name for name, section in SECTIONS.items() if section.option == "figure")


@dataclass(frozen=True)
class Selection:
    """The chosen runs: their records, the columns that tables show, groups of seeds, answers.

    `notes` collects skipped, missing and incomparable things. `margin` and `data` are settings of
    operating points.
    """

    records: "Sequence[RunRecord]"
    columns: "Sequence[Column]"
    groups: "Sequence[Group]"
    completions: "Completions"
    notes: list[str]
    margin: float = MARGIN
    data: str | None = None
    made: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, records: "Sequence[RunRecord]", margin: float = MARGIN, data: str | None = None
    ) -> "Selection":
        from dcr.report.columns import columns_of, seed_groups
        from dcr.report.records import Completions

        columns, notes = columns_of(records), [note for run in records for note in run.notes]
        counts = {
            tuple(sorted((name, of.n) for name, of in column.evaluation.sets.items()))
            for column in columns
        }
        if len(counts) > 1:
            notes.append(
                "not every column was evaluated on the same sets and counts: do not compare pooled "
                "values"
            )
        groups = seed_groups(columns)
        return cls(records, columns, groups, Completions(notes), notes, margin, data)

    @property
    def frame(self) -> "pd.DataFrame":
        """Every number of the runs' evaluations, from `dcr.results.load`."""
        from dcr import results

        return results.load([run.folder for run in self.records if run.evaluations])

    @cached_property
    def styles(self) -> "Styles":
        from dcr.report.columns import run_styles

        return run_styles(self.records)

    def leave_out(self, figure: str, lack: str, runs: "Sequence[RunRecord]") -> None:
        """Notes which runs a figure shows nothing of, and what they lack."""
        from dcr.report.records import folders

        self.notes.extend(f"figure {figure}: no {lack} in {folders([run])}" for run in runs)

    def section(self, name: str, section: Section | None = None) -> Any:
        """Makes a section of these runs once and remembers it; an empty result is falsy."""
        section = section or SECTIONS[name]
        if name not in self.made:
            self.made[name] = section.function(self, *section.arguments)
        return self.made[name]


class Figure(ABC):
    """The base of a user's own figure: a dataclass whose fields are its settings."""

    @abstractmethod
    def draw(self, chosen: Selection) -> "Drawing":
        """The panels of the runs' values. Raises UserError if the runs lack them."""


class Table(ABC):
    """The base of a user's own table: a dataclass whose fields are its settings."""

    @abstractmethod
    def frame(self, chosen: Selection) -> "pd.DataFrame":
        """The rows under headings. Raises UserError if the runs lack them."""
