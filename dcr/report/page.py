"""The report as one self-contained HTML page, and as plain text for the terminal."""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from markupsafe import Markup
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import dcr
from dcr.core.balance import Balance
from dcr.core.config import Kind
from dcr.core.text import printable
from dcr.report import claims, curves, discernment, figures, paper, studies, tables, trade_offs
from dcr.report.claims import ClaimRow
from dcr.report.comparisons import Comparison, comparisons, p_value, points, verdict
from dcr.report.figures import Drawing
from dcr.report.paper import PaperTable
from dcr.report.records import (
    Answer,
    Column,
    Completions,
    Group,
    RunRecord,
    Style,
    about,
    columns_of,
    evaluations_of,
    flattened,
    run_styles,
    seed_groups,
    steering,
    variant,
)
from dcr.report.tables import (
    CONTAMINATED,
    IN_DISTRIBUTION,
    Cell,
    Section,
    any_marked,
    confusion,
    in_words,
    keyword_sections,
    marked_sets,
    set_names,
    text_of,
)

PROMPTS_A_SET = 30
OVERVIEW = ("keyword", "judged", "general")  # grids whose sums are beside each run


@dataclass(frozen=True)
class Shown:
    """A printed figure as the page shows it, with the command that drew it."""

    figure: Drawing
    files: dict[str, bytes]  # by ending
    command: str

    @property
    def source(self) -> str:
        """As a picture of its own, whose names cannot clash with the page's."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.files['svg']).decode()}"


@dataclass(frozen=True)
class Report:
    """All that a page shows, computed."""

    records: Sequence[RunRecord]
    columns: Sequence[Column]
    grids: dict[str, list[Section]]
    groups: Sequence[Group]
    seeds: Sequence[Section]
    verdict: Sequence[str]  # on top: what it comes to, and warnings
    pairs: Sequence[Comparison]
    notes: Sequence[str]
    completions: Completions
    paper: Sequence[PaperTable]
    drawn: Sequence[Shown]
    claims: Sequence[ClaimRow]

    @classmethod
    def of(
        cls,
        records: Sequence[RunRecord],
        wanted_tables: Sequence[str] = (),
        drawn: Sequence[Shown] = (),
        with_claims: bool = False,
        more_notes: Sequence[str] = (),
    ) -> "Report":
        """Everything that was measured of some runs, with the tables of the paper by name."""
        columns, notes = columns_of(records), list(more_notes)
        completions, groups = Completions(notes), seed_groups(columns)
        ranked = discernment.sections(columns, completions)
        grids = tables.grids(columns, ranked)
        equal = [r for s in ranked if s.short == discernment.EQUAL for r in s.rows]
        silent = [(column.name, column.evaluation.silence) for column in columns]
        report = cls(
            records,
            columns,
            grids,
            groups,
            tables.over_seeds([part for key in tables.OVER_SEEDS for part in grids[key]], groups),
            [
                verdict(columns, groups, next((r for r in equal if "0.8" in r.label), None)),
                *(f"Warning: {name}: {silence}." for name, silence in silent if silence),
            ],
            comparisons(columns, completions),
            notes,
            completions,
            [
                discernment.table(columns, groups, completions)
                if name == discernment.NAME
                else (paper.TABLES | studies.TABLES)[name](columns, groups)
                for name in dict.fromkeys(wanted_tables)
            ],
            drawn,
            claims.claim_rows(records, notes) if with_claims else [],
        )
        for column in columns:  # read first, so that the page can tell what was skipped
            for name in column.evaluation.sets:
                completions(column, name)
        notes[:0] = [note for record in records for note in record.notes]
        counts = {
            tuple(sorted((name, of.n) for name, of in column.evaluation.sets.items()))
            for column in columns
        }
        if len(counts) > 1:
            notes.insert(
                sum(len(record.notes) for record in records),
                "not every column was evaluated on the same sets and counts: do not compare pooled "
                "values",
            )
        notes += [note for shown in drawn for note in shown.figure.notes]
        return report

    @property
    def sections(self) -> list[Section]:
        """Of all grids."""
        return [section for grid in self.grids.values() for section in grid]


@dataclass(frozen=True)
class Sample:
    """One prompt with the answer of every column, None where a column has none."""

    prompt: str
    answers: list[Answer | None]

    @property
    def verdicts(self) -> str:
        """Words to filter by: the verdicts that occur, and whether they differ."""
        verdicts = sorted({answer.verdict for answer in self.answers if answer})
        return " ".join([*verdicts, "differ"] if len(verdicts) > 1 else verdicts)


def render(report: Report) -> str:
    """The page's HTML; everything that came from files is escaped."""
    environment = paper.templates()
    environment.globals |= {
        "text_of": text_of,
        "in_words": in_words,
        "points": points,
        "p_value": p_value,
        "glyphs": figures.GLYPHS,
        "dagger": IN_DISTRIBUTION,
        "double_dagger": CONTAMINATED,
        "drawing": lambda drawing: Markup(figures.inline(drawing)),  # our own, its texts escaped
    }
    trained = _by_seed(report)
    kinds = {kind: set_names(report.columns, kind) for kind in (Kind.seemingly_toxic, Kind.toxic)}
    return environment.get_template("report.html").render(
        vars(report),
        version=dcr.__version__,
        recommended=keyword_sections(report.columns, "recommended"),
        marked=sorted(map(in_words, marked_sets(report.columns))),
        contaminated=any_marked(report.sections, CONTAMINATED),
        confusions=[
            (c, a, confusion(a))
            for c in report.columns
            for a in c.evaluation.agreement
            if a.kappa is not None
        ],
        claims=claims.by_claim(report.claims),
        claims_rule=claims.RULE,
        models=_distinct(report, "model"),
        data=_distinct(report, "data"),
        curves=curves.training(trained),
        curve_legend=[(style, name) for style, name, _ in trained],
        probabilities=curves.tracked("probability", trained),
        kernels=curves.tracked("kernel", trained),
        ablations=trade_offs.ablations(report.columns),
        overview=_overview(report),
        legend=_legend(report),
        trade_offs=trade_offs.trade_offs(report.records, report.columns),
        has_frontier=any(e.weights == "snapshot" for r in report.records for e in r.evaluations),
        compared=_compared(report),
        samples=[(kind.value, n, _sample(report, n)) for kind in kinds for n in kinds[kind]],
        settings=_settings(report),
        rows=[(r.folder.name, *_rows(r)) for r in report.records if r.rows.get("rows")],
        configs=[(record.folder.name, _yaml(record)) for record in report.records if record.config],
    )  # fmt: skip


def _distinct(report: Report, key: str) -> list[str]:
    values = [about(r, e, key) for r in report.records for e in evaluations_of(r)]
    return [value for value in dict.fromkeys(values) if value]


def _style_of(record: RunRecord, styles: dict[tuple[str, str], Style]) -> Style:
    """The style of a run's trained weights; neutral for the base model."""
    evaluations = evaluations_of(record)
    trained = [e for e in evaluations if e.weights != "base"] or evaluations
    first = min(trained, key=lambda evaluation: steering(evaluation) != "")
    return styles[variant(record, first), about(record, first, "seed")]


def _by_seed(report: Report) -> list[tuple[Style, str, list[RunRecord]]]:
    """Runs that logged something: those that differ by their seed alone are one, with one name."""
    styles, groups = run_styles(report.records), {}
    labels = dict(
        zip((r.folder for r in report.records), curves.names(report.records), strict=True)
    )
    labels = {folder: tuple(name.split(", ")) for folder, name in labels.items()}
    trained = [column for column in report.columns if column.evaluation.weights != "base"]
    labels |= {column.run.folder: column.label for column in reversed(trained)}
    for run in report.records:
        if run.metrics or run.tracked:
            style = _style_of(run, styles)
            key = (
                style.variant or run.folder
            )  # of neutral ones nothing tells whether they are alike
            groups.setdefault(key, []).append((style, labels[run.folder], run))
    named = []
    for alike in groups.values():
        style, label, _ = alike[0]
        if len(alike) > 1:
            label = [*(p for p in label if not p.startswith("seed ")), f"{len(alike)} seeds"]
        named.append((style, " ".join(label), [run for *_, run in alike]))
    return named


def _legend(report: Report) -> list[tuple[Style, str]]:
    """A name for every style: the column's, or the folder's where a run has no column."""
    styles, called = run_styles(report.records), {}
    for column in report.columns:
        called.setdefault(column.style, column.name)
    for record in report.records:
        called.setdefault(_style_of(record, styles), record.folder.name)
    return list(called.items())


def _compared(report: Report) -> tuple[int, int]:
    """Places of the two columns whose answers stand side by side at first."""
    for pair in report.pairs:
        return report.columns.index(pair.b), report.columns.index(pair.a)
    return max(0, len(report.columns) - 2), max(0, len(report.columns) - 1)


def _overview(report: Report) -> list[tuple[str, str, list[Cell | None]]]:
    """What sums up each table, by its table and row: a value a column."""
    summed = []
    for section in (s for key in OVERVIEW for s in report.grids[key]):
        rows = [row for row in section.rows if row.summary and not row.page_only]
        summed += [(section.short, row.label, list(row.values)) for row in rows or section.rows]
    return summed


def _sample(report: Report, name: str) -> list[Sample]:
    """Up to PROMPTS_A_SET prompts, evenly over the set, and as many of different verdicts."""
    stored = [
        {(c.id, c.prompt): c for c in report.completions(column, name)}
        if name in column.evaluation.sets
        else {}
        for column in report.columns
    ]
    keys = list(dict.fromkeys(key for answers in stored for key in answers))
    samples = {key: Sample(key[1], [answers.get(key) for answers in stored]) for key in keys}
    differing = [key for key in keys if samples[key].verdicts.endswith("differ")]
    chosen = {*evenly(keys, PROMPTS_A_SET), *evenly(differing, PROMPTS_A_SET)}
    return [samples[key] for key in keys if key in chosen]


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """`count` items at even distances, first and last among them; all if there are fewer."""
    if len(items) <= count:
        return list(items)
    return [items[round(place * (len(items) - 1) / (count - 1))] for place in range(count)]


def _settings(report: Report) -> list[tuple[Column, str, str]]:
    """Of every column: the folder, and how it was evaluated."""
    lines = []
    for column in report.columns:
        settings = flattened(column.evaluation.settings)
        words = ", ".join(f"{key}={'all' if v is None else v}" for key, v in settings.items())
        speed = column.evaluation.tokens_per_second
        seconds = column.evaluation.seconds
        if isinstance(seconds, (int, float)):
            words += f"; {seconds:.0f} s"
        if isinstance(speed, (int, float)):
            words += f", {speed:.0f} tokens/s"
        lines.append((column, column.run.folder.name, printable(words)))
    return lines


def _rows(record: RunRecord) -> tuple[list[Any], ...]:
    """(part, count, fingerprint) of the rows used, (reason, count) of those dropped, the lists of
    in-distribution sets and unseen groups, and (what, value) of how stage one's kinds differ."""
    parts, dropped = (record.rows.get(key) or {} for key in ("rows", "dropped"))
    used = [(name, of["count"], of["fingerprint"]) for name, of in parts.items() if of["count"]]
    known, unseen = (record.rows.get(key) or [] for key in ("in_distribution", "unseen_groups"))
    balance = record.rows.get("balance")
    return used, list(dropped.items()), known, unseen, Balance(**balance).rows() if balance else []


def _yaml(record: RunRecord) -> str:
    plain = json.loads(json.dumps(record.config, default=str))
    return printable(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))


INTERVALS = (
    "Brackets: 95% intervals (Wilson; over five sets combined; bootstrap for AUROC; ±1.96 standard "
    "errors for ability)."
)
FOOTNOTES = {
    IN_DISTRIBUTION: "in-distribution: training saw prompts of this set.",
    CONTAMINATED: "contaminated: some of its prompts stand among the rows trained on, or steering "
    "was made from them.",
}
SPREAD = "± after a win rate: its standard error."
LABEL_WIDTH, HEAD_WIDTH = 26, 16  # longer names are folded


def plain_text(title: str, report: Report, width: int) -> str:
    """All tables as text of at most `width` columns where the names allow it."""
    console = Console(
        width=width, file=io.StringIO(), color_system=None, force_terminal=False, markup=False,
        emoji=False, highlight=False,
    )  # fmt: skip
    columns, table, groups = report.columns, report.sections, report.groups
    console.print(title, *filter(None, report.verdict), sep="\n")
    for chunk in _chunks(width, [column.label for column in columns], table):
        console.print(chunk)
    if groups:
        console.print()
        console.print("Mean ± standard deviation over seeds")
        for chunk in _chunks(width, [group.label for group in groups], report.seeds):
            console.print(chunk)
    if report.pairs:
        console.print()
        console.print(_paired(report.pairs))
    if columns:
        console.print()
        for mark, text in FOOTNOTES.items():
            if any_marked(table, mark, in_terminal=True):
                console.print(f"{mark} {text}")
        console.print(f"{INTERVALS} {SPREAD}" if _has_spread(table) else INTERVALS)
    for note in report.notes:
        console.print(f"note: {note}", soft_wrap=True)
    output = console.file
    assert isinstance(output, io.StringIO)
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines())


def _has_spread(table: Sequence[Section]) -> bool:
    values = [value for section in table for row in section.rows for value in row.values]
    return any(value is not None and value.spread is not None for value in values)


def _chunks(
    width: int, labels: Sequence[tuple[str, ...]], table: Sequence[Section]
) -> list[Table | Text]:
    """As few tables as the width allows, each with as many columns as fit, at least one."""
    table = [section for section in table if not all(row.page_only for row in section.rows)]
    rows = [row for section in table for row in section.rows if not row.page_only]
    names = max((len(in_words(row.label)) + 2 for row in rows), default=0)
    widths = [min(names, LABEL_WIDTH)]
    for place, label in enumerate(labels):
        cells = max((len(text_of(row.values[place])) for row in rows), default=0)
        parts = max(len(part) for part in label)
        widths.append(max(cells, min(parts, HEAD_WIDTH)))
    chunks: list[Table | Text] = []
    start = 0
    while start < len(labels):
        stop = start + 1
        while stop < len(labels) and sum(w + 2 for w in widths[start + 1 : stop + 2]) <= (
            width - widths[0]
        ):
            stop += 1
        if start:
            chunks.append(Text())
        chunks.append(_table(labels, table, widths, range(start, stop)))
        start = stop
    return chunks


def _table(
    labels: Sequence[tuple[str, ...]], table: Sequence[Section], widths: list[int], places: range
) -> Table:
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    drawn.add_column("", overflow="fold", width=widths[0])
    for place in places:
        head = Text("\n".join(labels[place]))
        drawn.add_column(head, justify="right", overflow="fold", width=widths[place + 1])
    for section in table:
        drawn.add_row(Text(section.short))
        for row in section.rows:
            if not row.page_only:
                cells = [Text(text_of(row.values[place])) for place in places]
                drawn.add_row(Text(f"  {in_words(row.label)}"), *cells)
        drawn.add_section()
    return drawn


def _paired(pairs: Sequence[Comparison]) -> Table:
    drawn = Table(
        title="Paired differences over the same prompts, all sets pooled, percentage points; p by "
        "McNemar, and adjusted by Holm for all sets compared",
        title_justify="left", title_style="", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False,
        padding=(0, 1, 0, 0),
    )  # fmt: skip
    drawn.add_column("", overflow="fold")
    drawn.add_column("", no_wrap=True)
    for head in ("difference", "p", "p, Holm"):
        drawn.add_column(head, justify="right", no_wrap=True)
    for pair in pairs:
        name = f"{pair.a.name} − {pair.b.name}"
        for line in (line for line in pair.lines if line.pooled):
            quantity = "refusal" if line.kind is Kind.toxic else "compliance"
            cells = (name, quantity, points(line.difference), p_value(line.p), p_value(line.holm))
            drawn.add_row(*map(Text, cells))
            name = ""
    return drawn
