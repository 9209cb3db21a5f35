"""The report as one self-contained HTML page."""

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import dcr
from dcr import storage
from dcr.config import Kind
from dcr.report import claims_shown, figures, judged, markup
from dcr.report.cells import CONTAMINATED, IN_DISTRIBUTION, Section, any_marked, text_of
from dcr.report.completions import Completion
from dcr.report.entries import (
    Entry,
    Group,
    Style,
    about,
    evaluations_of,
    flattened,
    run_styles,
    settings_without_seed,
    steering,
    variant,
)
from dcr.report.figures import Curves, Frontier, Panel, Point
from dcr.report.finding import Finding
from dcr.report.measured import Grids
from dcr.report.paired import Comparison, p_value, points
from dcr.report.paper import PaperTable
from dcr.report.printed import Printed
from dcr.report.printing import printable
from dcr.report.records import Evaluation, RunRecord
from dcr.report.tables import keyword, marked_sets, of_sets, pooled, sections, set_names, together

PROMPTS_A_SET = 30


@dataclass(frozen=True)
class Shown:
    """A printed figure as the page shows it, with the command that drew it."""

    figure: Printed
    svg: bytes
    command: str

    @property
    def source(self) -> str:
        """As a picture of its own, whose names cannot clash with the page's."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg).decode()}"


@dataclass(frozen=True)
class Report:
    """All that a page shows, computed."""

    records: Sequence[RunRecord]
    columns: Sequence[Entry]
    grids: Grids
    groups: Sequence[Group]
    seeds: Sequence[Section]
    pairs: Sequence[Comparison]
    notes: Sequence[str]
    completions: Callable[[Entry, str], list[Completion]]
    paper: Sequence[PaperTable] = ()
    drawn: Sequence[Shown] = ()
    claims: Sequence[Finding] = ()


@dataclass(frozen=True)
class Sample:
    """One prompt with the answer of every column, None where a column has none."""

    prompt: str
    answers: list[Completion | None]

    @property
    def verdicts(self) -> str:
        """Words to filter by: the verdicts that occur, and whether they differ."""
        found = sorted({_verdict(answer) for answer in self.answers if answer})
        return " ".join([*found, "differ"] if len(found) > 1 else found)


def render(report: Report) -> str:
    """The page's HTML; everything that came from files is escaped."""
    environment = Environment(
        loader=PackageLoader("dcr"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.globals |= {
        "text_of": text_of,
        "points": points,
        "p_value": p_value,
        "glyph": figures.glyph,
        "colour": figures.colour_class,
        "verdict": _verdict,
        "dagger": IN_DISTRIBUTION,
        "double_dagger": CONTAMINATED,
        "drawing": lambda panel: Markup(panel.svg),  # our own, its texts escaped
        "paper_table": lambda table: Markup(markup.html_table(table)),  # its texts escaped
    }
    kinds = {kind: set_names(report.columns, kind) for kind in (Kind.seemingly_toxic, Kind.toxic)}
    return environment.get_template("report.html").render(
        version=dcr.__version__,
        columns=report.columns,
        grids=report.grids,
        recommended=sections(report.columns, "recommended"),
        groups=report.groups,
        seeds=report.seeds,
        pairs=report.pairs,
        notes=report.notes,
        marked=marked_sets(report.columns),
        contaminated=any_marked(report.grids.all, CONTAMINATED),
        confusions=judged.confusions(report.columns),
        paper=report.paper,
        drawn=report.drawn,
        claims=claims_shown.by_claim(report.claims),
        claims_rule=claims_shown.RULE,
        models=_distinct(report, "model"),
        data=_distinct(report, "data"),
        curves=_curves(report),
        curve_legend=_legend(report, trained_only=True),
        legend=_legend(report),
        trade_offs=_trade_offs(report),
        has_frontier=any(e.weights == "snapshot" for r in report.records for e in r.evaluations),
        samples=[(kind.value, n, _sample(report, n)) for kind in kinds for n in kinds[kind]],
        settings=_settings(report),
        rows=[(r.folder.name, *_rows(r)) for r in report.records if r.rows.get("rows")],
        configs=[(record.folder.name, _yaml(record)) for record in report.records if record.config],
    )  # fmt: skip


def _distinct(report: Report, key: str) -> list[str]:
    values = [about(r, e, key) for r in report.records for e in evaluations_of(r)]
    return [value for value in dict.fromkeys(values) if value]


def _verdict(completion: Completion) -> str:
    return "refused" if completion.refused["paper"] else "complied"


def _style_of(record: RunRecord, styles: dict[tuple[str, str], Style]) -> Style:
    """The style of a run's trained weights; neutral for the base model."""
    evaluations = evaluations_of(record)
    found = [e for e in evaluations if e.weights != "base"] or evaluations
    first = min(found, key=lambda evaluation: steering(evaluation) != "")
    return styles[variant(record, first), about(record, first, "seed")]


def _curves(report: Report) -> list[Panel]:
    styles = run_styles(report.records)
    return figures.training_curves(
        [Curves(_style_of(r, styles), r.metrics) for r in report.records if r.metrics]
    )


def _legend(report: Report, trained_only: bool = False) -> list[tuple[Style, str]]:
    """A name for every style: the column's, or the folder's where a run has no column."""
    styles, names = run_styles(report.records), {}
    for entry in report.columns:
        if not trained_only or (entry.evaluation.weights != "base" and entry.run.metrics):
            names.setdefault(entry.style, entry.name)
    for record in report.records:
        if not trained_only or record.metrics:
            names.setdefault(_style_of(record, styles), record.folder.name)
    return list(names.items())


def _trade_offs(report: Report) -> list[Panel]:
    kinds = (Kind.seemingly_toxic, Kind.toxic)
    names = [together(set_names(report.columns, kind)) for kind in kinds]
    marked = marked_sets(report.columns)
    unmarked = [[name for name in of_kind if name not in marked] for of_kind in names]
    panels = []
    if all(names):
        panels.append(_trade_off(report, "tradeoff", "All sets pooled", names))
    if all(unmarked) and unmarked != names:
        title = "Sets that no run trained on, pooled"
        panels.append(_trade_off(report, "tradeoff-unseen", title, unmarked))
    return panels


def _trade_off(report: Report, name: str, title: str, names: list[list[str]]) -> Panel:
    points = []
    for entry in report.columns:
        x, y = (pooled(of_sets(entry, of_kind), keyword("paper")) for of_kind in names)
        if x and y:
            points.append(Point(entry.style, x, y))
    return figures.trade_off(name, title, points, _frontiers(report, names))


def _frontiers(report: Report, names: list[list[str]]) -> list[Frontier]:
    """One line a run and evaluation setting, through its snapshots by step."""
    styles, found = run_styles(report.records), {}
    for place, record in enumerate(report.records):
        for e in sorted(record.evaluations, key=lambda e: e.step or 0):
            x, y = (_estimate(e, of_kind) for of_kind in names)
            if e.weights == "snapshot" and x is not None and y is not None:
                key = place, storage.fingerprint(settings_without_seed(e))
                style = styles[variant(record, e), about(record, e, "seed")]
                found.setdefault(key, (style, []))[1].append((x, y))
    return [Frontier(style, points) for style, points in found.values()]


def _estimate(evaluation: Evaluation, names: Sequence[str]) -> float | None:
    scores = [evaluation.sets[name] for name in names if name in evaluation.sets]
    interval = pooled(scores, keyword("paper"))
    return interval.estimate if interval else None


def _sample(report: Report, name: str) -> list[Sample]:
    """Up to PROMPTS_A_SET prompts, evenly over the set, with every column's answer."""
    stored = [
        {(c.id, c.prompt): c for c in report.completions(entry, name)}
        if name in entry.evaluation.sets
        else {}
        for entry in report.columns
    ]
    keys = list(dict.fromkeys(key for answers in stored for key in answers))
    return [
        Sample(key[1], [answers.get(key) for answers in stored])
        for key in evenly(keys, PROMPTS_A_SET)
    ]


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """`count` items at even distances, first and last among them; all if there are fewer."""
    if len(items) <= count:
        return list(items)
    return [items[round(place * (len(items) - 1) / (count - 1))] for place in range(count)]


def _settings(report: Report) -> list[tuple[Entry, str, str]]:
    """Of every column: the folder, and how it was evaluated."""
    lines = []
    for entry in report.columns:
        told = flattened(entry.evaluation.settings)
        words = ", ".join(f"{key}={'all' if v is None else v}" for key, v in told.items())
        speed = entry.evaluation.tokens_per_second
        seconds = entry.evaluation.seconds
        if isinstance(seconds, (int, float)):
            words += f"; {seconds:.0f} s"
        if isinstance(speed, (int, float)):
            words += f", {speed:.0f} tokens/s"
        lines.append((entry, entry.run.folder.name, printable(words)))
    return lines


def _rows(record: RunRecord) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
    """(part, count, fingerprint) of the rows used, (reason, count) of those dropped, and the lists
    of in-distribution sets and unseen groups."""
    parts, dropped = (
        found if isinstance(found := record.rows.get(key), dict) else {}
        for key in ("rows", "dropped")
    )
    used = [
        (name, part.get("count", 0), part.get("fingerprint", ""))
        for name, part in parts.items()
        if isinstance(part, dict) and part.get("count")
    ]
    known, unseen = (
        found if isinstance(found := record.rows.get(key), list) else []
        for key in ("in_distribution", "unseen_groups")
    )
    return used, list(dropped.items()), known, unseen


def _yaml(record: RunRecord) -> str:
    plain = json.loads(json.dumps(record.config, default=str))
    return printable(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
