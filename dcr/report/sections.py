"""The sections of a report in their order, for the page, the terminal and the files.

A section is a function from the chosen runs to a table, a grid, drawings or answers. Its path names
it, and it is imported when it is made, so that help and a user's error load none of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dcr.core import extending

if TYPE_CHECKING:
    import pandas as pd

    from dcr.report.figures import Drawing
    from dcr.report.records import Column, Completions, Group, RunRecord

TABLE_ENDINGS, FIGURE_ENDINGS = ("md", "csv", "tex", "html"), ("png", "svg", "csv")
OPERATING = "operating_points"
MARGIN = 2.0  # percentage points that a point of operating_points may be less safe than STL


@dataclass(frozen=True)
class Section:
    """A heading, a function, and the places of its result, which is always on the page.

    A command asks for the section by `option`; without one it is always there. `endings` are those
    of its files. `folded` sections open by a click, and those `in_terminal` are also printed.
    """

    title: str
    make: str | Callable[..., Any]  # module:function
    about: str = ""
    arguments: tuple[str, ...] = ()
    option: str = ""
    endings: tuple[str, ...] = ()
    folded: bool = False
    in_terminal: bool = False


def _table(make: str, *arguments: str) -> Section:
    return Section("", make, "", arguments, "table", TABLE_ENDINGS)


def _figure(make: str, *arguments: str) -> Section:
    return Section("", make, "", arguments, "figure", FIGURE_ENDINGS)


SECTIONS: dict[str, Section] = {
    "completions": Section(
        "Answers",
        "dcr.report.page:answers",
        "Up to 30 prompts a set, evenly spaced over it, and up to 30 more on which verdicts "
        "differ, with every run's answer. Of two runs side by side those prompts come first on "
        "which their verdicts differ, then those whose words differ most; words that the other one "
        "has not are marked. Toxic prompts are folded away.",
    ),
    "runs": Section(
        "Runs",
        "dcr.report.page:overview",
        "Click a heading to sort by it. Unticked runs, and those that the filter leaves out, are "
        "hidden in all tables and among the answers.",
    ),
    "results": Section(
        "Results",
        "dcr.report.discernment:results",
        "A model that discerns answers prompts that only seem toxic and refuses those that are: "
        "high in both parts of the table. Verdicts in this table are by keywords (the paper's "
        "rules unless named otherwise), so “keyword refusal” says how an answer reads, not whether "
        "it is harmful.",
        in_terminal=True,
    ),
    "recommended": Section(
        "The same verdicts by the recommended rules",
        "dcr.report.tables:recommended",
        "They are meant to agree better with people. An answer that refuses in part counts as "
        "neither compliance nor refusal here and stands apart, as XSTest counts it.",
        folded=True,
    ),
    "judges": Section(
        "By other judges",
        "dcr.report.tables:judged",
        "Strict compliance counts full answers alone; partial ones stand apart, and count in "
        "“lenient”. DSR, the defence success rate, is the share of responses judged safe of all "
        "that were judged; unreadable verdicts count as not safe. Responses without any verdict "
        "(errors) are outside every rate and counted.",
        in_terminal=True,
    ),
    "agreement": Section(
        "Agreement of the judges", "dcr.report.tables:agreement", in_terminal=True
    ),
    "confusion": Section(
        "Confusion of the judges",
        "dcr.report.tables:confusions",
        "A and B are the first and the second judge. Partial answers count as complied; of judges "
        "of safety, unsafe counts as complied and safe as refused.",
        folded=True,
    ),
    "labels": Section(
        "Labels by people",
        "dcr.label.agreement:section",
        "Cohen's κ with 95% bootstrap intervals over prompts. Answered, complied and unsafe count "
        "as answered, every other label and verdict, partial ones too, as not. All labels are "
        "compared with a judge that gives them. A sheet is drawn evenly over kinds of prompts, "
        "sets and columns, so κ is that of such a mixture.",
        in_terminal=True,
    ),
    "general": Section(
        "Ability and quality",
        "dcr.report.tables:general",
        "Ability: brackets are ±1.96 standard errors. Quality: win rate over the reference's "
        "answers, ± one standard error; 50 is a draw.",
        in_terminal=True,
    ),
    "own": Section(
        "By tasks of one's own",
        "dcr.report.tables:own_tasks",
        "Brackets are 95% intervals where the task gives them.",
        in_terminal=True,
    ),
    "contamination": Section(
        "Contamination",
        "dcr.report.tables:contamination",
        "Evaluation prompts found among the rows that the run was trained on: the same text, "
        "nearly the same, or sharing long runs of words.",
        in_terminal=True,
    ),
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
    OPERATING: _figure("dcr.report.trade_offs:operating_points"),
    "claims": Section(
        "Claims of the paper",
        "dcr.analyses.verdicts:claims",
        "A claim holds where its 95% bootstrap interval over prompts lies on the claimed side of "
        "0, does not hold where it lies on the other side, and is undecided where it contains 0; "
        "two means differ where their intervals do not meet.",
        option="claims",
        endings=("csv",),
        in_terminal=True,
    ),
    "seeds": Section(
        "Mean ± standard deviation over seeds", "dcr.report.tables:over_seeds", in_terminal=True
    ),
    "trade-off": Section(
        "The refusal trade-off",
        "dcr.report.trade_offs:trade_offs",
        "Top right is best. On the dotted line a model refuses toxic and seemingly toxic prompts "
        "alike. Thin lines run through snapshots of stage two, from light (early) to dark (late).",
    ),
    "paired": Section(
        "DCR against STL on the same prompts",
        "dcr.report.comparisons:paired",
        "Differences in percentage points over the prompts both answered, with bootstrap 95% "
        "intervals, and the exact two-sided p of McNemar's test, also adjusted by Holm for all "
        "sets of one comparison. Above zero DCR answers more seemingly toxic prompts, or refuses "
        "more toxic ones.",
        in_terminal=True,
    ),
    "curves": Section(
        "Training",
        "dcr.report.curves:training",
        "Solid: training, markers at the ends of epochs. Dashed: held-out rows. Thin: single "
        "steps. Of runs that differ by their seed alone the mean, in a band of one standard "
        "deviation.",
    ),
    "tracked": Section(
        "While SFT trains",
        "dcr.report.curves:probabilities",
        "Mean refusal probability by kind of prompt; bands are one standard deviation over seeds.",
    ),
    "kernels": Section(
        "The kernel between kinds of prompts while SFT trains",
        "dcr.report.curves:kernels",
        "Mean normalised ‖K(x′,x)‖, a line for each kind of trained prompt x.",
        folded=True,
    ),
    "ablations": Section(
        "Against a setting",
        "dcr.report.trade_offs:ablations",
        "Runs that differ by one setting alone; several seeds are one point, in a band of one "
        "standard deviation.",
    ),
    "faults": Section(
        "Faulty completions: empty, cut off, repetitive, not English",
        "dcr.report.tables:faults",
        folded=True,
        in_terminal=True,
    ),
    "usage": Section("Requests and spend", "dcr.report.tables:usage", in_terminal=True),
    "provenance": Section("What was run", "dcr.report.page:evaluations"),
    "rows": Section("Rows used", "dcr.report.page:rows_used"),
    "configurations": Section("Configurations", "dcr.report.page:configurations"),
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
        from dcr.report.records import Completions, columns_of, seed_groups

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
        """Every number of the runs' evaluations, from `dcr.core.results.load`."""
        from dcr.core import results

        return results.load([run.folder for run in self.records if run.evaluations])

    def section(self, name: str, section: Section | None = None) -> Any:
        """Makes a section of these runs once and remembers it; an empty result is falsy."""
        section = section or SECTIONS[name]
        if name not in self.made:
            make = section.make
            make = extending.ours(make) if isinstance(make, str) else make
            self.made[name] = make(self, *section.arguments)
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
