"""The evaluation prompts that a run was trained on: equal, nearly equal, or with words in a row.

They are counted here, and shown as a section of the page.
"""

import itertools
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dcr.core import sources
from dcr.core.config import DataConfig, DataError, Kind, UserError
from dcr.core.evaluation import PromptSet
from dcr.core.runs import Run
from dcr.core.sources import Example
from dcr.core.text import normalise
from dcr.overlaps import overlaps

if TYPE_CHECKING:
    from dcr.report.grids import Cell, Grid
    from dcr.report.sections import Selection
    from dcr.results.schema import Overlap

log = logging.getLogger(__name__)

NGRAM = 13  # words in a row (Brown et al. 2020, appendix C)
SHORTEST = 8  # words; a shorter prompt stands in many an unrelated text
WAYS = ("exact", "near", "ngram")  # of sharing a prompt, the strongest first

# Lists of rows in `rows.json`: the config node and kind they came from, whether answers are learnt.
LEARNT = {
    "seemingly_toxic": ("seemingly_toxic", Kind.seemingly_toxic, False),
    "toxic": ("toxic", Kind.toxic, False),
    "normal": ("normal", Kind.normal, True),
    "refusals": ("safety", Kind.toxic, True),
    "augmented": (None, Kind.seemingly_toxic, True),
    "readout_seemingly_toxic": (None, Kind.seemingly_toxic, False),
    "readout_toxic": (None, Kind.toxic, False),
}


def measured(run: Run, sets: Sequence[PromptSet]) -> dict[str, Any]:
    """`report` of a run's sets, empty where it is not known what the run was trained on."""
    trained = trained_texts(run)
    if not trained:
        return {}
    asked = {b.name: [row.prompt for row in b.rows] for b in sets}
    near = run.config()["data"].get("near_duplicate", DataConfig.near_duplicate)
    return report(trained, asked, near=near)


def trained_texts(run: Run) -> dict[str, list[str]]:
    """`texts_of` a run; empty, with a warning, where a source has changed.

    It is empty as well for weights that were not trained here.
    """
    try:
        return texts_of(run.config()["data"], run.record())
    except UserError as error:  # its `data.root` may be gone as well
        log.warning("what was trained on is not known: %s", error)
        return {}


def texts_of(data: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, list[str]]:
    """All that a run was trained on, by source: prompts, and the responses of stage two.

    `data` is the node of the run's `config.yaml` and `record` its `rows.json`. Raises DataError
    where a source has changed since.
    """
    texts: dict[str, list[str]] = {}
    for part, (node, kind, answers) in LEARNT.items():
        rows = record.get("rows", {}).get(part)
        if not rows or not rows["ids"]:
            continue
        names = rows.get("sources") or data[node]["source"]  # as runs from before this key had it
        places, expected = rows.get("places"), rows["fingerprint"]
        for row in read_rows(names, rows["ids"], kind, data["root"], places, expected):
            learnt = [row.prompt, row.response] if answers and row.response else [row.prompt]
            texts.setdefault(row.source, []).extend(learnt)
    return texts


def read_rows(
    names: Sequence[str],
    ids: Sequence[str],
    kind: Kind,
    root: str | None = None,
    places: Sequence[int] | None = None,
    expected: str | None = None,
) -> list[Example]:
    """The rows that a run recorded by id, in that order, read again from its sources.

    `places` are those of the rows' sources among `names`. Without them an id that several of these
    hold stands for the first of those rows not used yet. `expected` is the fingerprint that the run
    recorded. Raises DataError if an id is gone or the texts have changed, and whatever `read`
    raises.
    """
    held: defaultdict[tuple[int | None, str], list[Example]] = defaultdict(list)
    for place, name in enumerate(names):
        for row in sources.read(name, root=root, kind=kind, scored=True):
            held[place if places else None, row.id].append(row)
    where, asked = ", ".join(names), [*zip(places or [None] * len(ids), ids, strict=True)]
    if missing := [identity for place, identity in asked if (place, identity) not in held]:
        raise DataError(
            f"{where}: no row is called {missing[0]!r} any more ({len(missing)} of {len(ids)} "
            "gone); set data.root to the files that the run was trained on"
        )
    rows = [held[key].pop(0) if len(held[key]) > 1 else held[key][0] for key in asked]
    if expected is not None and sources.fingerprint(rows) != expected:
        raise DataError(
            f"{where}: not the texts that the run was trained on; "
            "set data.root to the files used then"
        )
    return rows


def report(
    trained: Mapping[str, Sequence[str]],
    evaluated: Mapping[str, Sequence[str]],
    *,
    near: float = 0.9,
    ngram: int = NGRAM,
) -> dict[str, dict[str, int | dict[str, int]]]:
    """Counts the prompts of each evaluation set that a run has seen: `contamination` in metrics.

    `trained` holds by source every text trained on: prompts, and the responses of SFT. A prompt
    counts once, by the strongest of three ways:

    - `exact`, `near`: as in `overlaps`;
    - `ngram`: `ngram` words in a row stand in one text, both normalised (GPT-3's 13-gram rule).
      A shorter prompt counts if all its words stand in one text in that order without a gap, and
      there are at least eight; shorter ones are compared as exact and near only.

    `by_source` counts the prompts that a source holds in any of these ways: one prompt may count
    for several sources, and sources that hold none are left out.
    """
    prompts = [prompt for texts in evaluated.values() for prompt in texts]
    index = _phrases([normalise(prompt).split() for prompt in prompts], ngram)
    ways: list[dict[str, int]] = [{} for _ in prompts]  # one a prompt: source -> place in WAYS
    for source, texts in trained.items():
        distinct = list(dict.fromkeys(texts))
        for place in _sharing(distinct, index, min(ngram, SHORTEST)):
            ways[place][source] = WAYS.index("ngram")
        for place, overlap in enumerate(overlaps(prompts, {source: distinct}, near=near)):
            if overlap is not None:
                ways[place][source] = WAYS.index("exact" if overlap.exact else "near")
    counts, in_order = {}, iter(ways)
    for name, texts in evaluated.items():
        found = list(itertools.islice(in_order, len(texts)))
        strongest = [min(by_source.values()) for by_source in found if by_source]
        total = Counter(source for by_source in found for source in by_source)
        by_way = {way: strongest.count(place) for place, way in enumerate(WAYS)}
        counts[name] = {"n": len(texts), **by_way, "by_source": dict(sorted(total.items()))}
    return counts


Phrase = tuple[str, ...]
# by first words, each phrase with the places of the prompts that hold it
Index = Mapping[Phrase, Mapping[Phrase, list[int]]]


def _phrases(prompts: Sequence[Sequence[str]], ngram: int) -> Index:
    """The phrases that count as overlap with each prompt: its n-grams, or all of a shorter one."""
    shortest = min(ngram, SHORTEST)
    index: dict[Phrase, dict[Phrase, list[int]]] = defaultdict(lambda: defaultdict(list))
    for place, words in enumerate(prompts):
        size = min(ngram, len(words))
        if size >= shortest:
            for start in range(len(words) - size + 1):
                phrase = tuple(words[start : start + size])
                index[phrase[:shortest]][phrase].append(place)
    return index


def _sharing(texts: Iterable[str], index: Index, shortest: int) -> set[int]:
    """The places of the prompts that share a phrase with one of the texts."""
    sharing: set[int] = set()
    for text in texts:
        words = normalise(text).split()
        for start in range(len(words) - shortest + 1):
            phrases = index.get(tuple(words[start : start + shortest]))
            for phrase, places in phrases.items() if phrases else ():
                if tuple(words[start : start + len(phrase)]) == phrase:
                    sharing.update(places)
    return sharing


def section(chosen: "Selection") -> "Grid":
    """Contamination.

    Evaluation prompts found among the rows that the run was trained on: the same text, nearly the
    same, or sharing long runs of words.
    """
    from dcr.report import grids  # an evaluation counts without what draws the page

    columns, overlaps = chosen.columns, [c.evaluation.contamination for c in chosen.columns]
    touched = {name for by_name in overlaps for name, of in by_name.items() if of.any}

    def cell(of: "Overlap") -> "Cell":
        by_source = ", ".join(f"{source} {n}" for source, n in of.by_source.items())
        return grids.words(f"{grids.ways_of(of)} of {of.n}", by_source)

    rows = grids.rows_by_key(columns, lambda e: e.contamination, cell)
    rows = [replace(row, page_only=row.label not in touched) for row in rows]
    title = "Evaluation prompts among the rows trained on: exact / near / n-gram"
    short = "in training: exact / near / n-gram"
    return grids.Grid.of(columns, f"{grids.CONTAMINATED} {title}", short, rows)
