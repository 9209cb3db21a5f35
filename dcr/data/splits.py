"""The rows of a run: read, cleaned of what is evaluated on, and drawn into disjoint parts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dcr import sources
from dcr.config import AugmentConfig, ConfigError, DataConfig, Kind
from dcr.data import augmentation
from dcr.data.sifting import Sift
from dcr.sources import Example
from dcr.text import normalise

HELD_OUT_PAIRS = 64  # prompts a class that stage one is watched on; more would only cost time


@dataclass(frozen=True)
class Splits:
    """The rows of a run: disjoint, drawn by seed, with what was dropped and why."""

    seemingly_toxic: list[Example] = field(default_factory=list)
    toxic: list[Example] = field(default_factory=list)
    seemingly_toxic_heldout: list[Example] = field(default_factory=list)
    toxic_heldout: list[Example] = field(default_factory=list)
    normal: list[Example] = field(default_factory=list)
    refusals: list[Example] = field(default_factory=list)
    normal_heldout: list[Example] = field(default_factory=list)
    refusals_heldout: list[Example] = field(default_factory=list)
    augmented: list[Example] = field(default_factory=list)  # STL-aug's, as often as they are learnt
    dropped: dict[str, int] = field(default_factory=dict)
    in_distribution: list[str] = field(default_factory=list)
    unseen_groups: list[str] = field(default_factory=list)

    def parts(self) -> dict[str, list[Example]]:
        """Every list of rows by its name; that of STL-aug only where there is one."""
        about = ("dropped", "in_distribution", "unseen_groups")
        about = about if self.augmented else (*about, "augmented")
        return {name: rows for name, rows in vars(self).items() if name not in about}


def split(
    config: DataConfig,
    ratio: float | None,
    seed: int,
    contrastive: bool,
    refuses: Callable[..., bool],
    augment: AugmentConfig | None = None,
) -> Splits:
    """Read every source and draw the rows of both stages (Section 7.1).

    The safety pairs of SFT are drawn first and the toxic prompts of stage one from the rest, so
    the two are disjoint and a ratio sweep leaves SFT untouched. Rows too near an evaluation
    prompt are dropped and counted, save those of a source that is itself evaluated on, which
    make that set in-distribution.

    `ratio` is toxic rows per seemingly toxic one, None for every toxic row left. Without
    `contrastive` the lists of stage one stay empty. `refuses` judges a response, by the paper's
    keyword rules or by those that its second argument names. `augment` adds the rows of STL-aug
    and leaves every other list as it is.
    Raises ConfigError when a source holds fewer rows than asked for, and DataError for an answer
    of STL-aug's file that refuses.
    """
    sift = Sift(config)
    normal = _with_response(sift.clean("normal", Kind.normal), "data.normal")
    pairs = sift.clean("safety", Kind.toxic)
    if config.safety.refusals_only:
        pairs = [row for row in pairs if row.response and refuses(row.response)]
    pairs = _with_response(pairs, "data.safety")
    refusals, refusals_left = _draw(pairs, config.safety.count, seed, "data.safety.count")
    general, general_left = _draw(normal, config.normal.count, seed, "data.normal.count")
    refusals_left = refusals_left[: round(config.validation * len(refusals))]
    general_left = general_left[: round(config.validation * len(general))]
    rows = Splits(
        normal=general,
        refusals=refusals,
        normal_heldout=general_left,
        refusals_heldout=refusals_left,
        in_distribution=sift.in_distribution(contrastive),
    )
    if contrastive:
        rows = _with_stage_one(rows, config, ratio, seed, sift)
    if augment is not None:
        rows = _with_answers(rows, config, augment, seed, sift, refuses)
    return replace(rows, dropped=dict(sift.dropped))


def _with_stage_one(
    rows: Splits, config: DataConfig, ratio: float | None, seed: int, sift: Sift
) -> Splits:
    safe = sift.clean("seemingly_toxic", Kind.seemingly_toxic)
    taken = {normalise(r.prompt) for r in [*rows.refusals, *rows.refusals_heldout]}
    toxic = sift.clean("toxic", Kind.toxic)
    toxic = [row for row in toxic if normalise(row.prompt) not in taken]
    unseen: tuple[list[Example], list[Example]] = ([], [])
    if config.group_holdout > 0:
        safe, safe_unseen = sources.split_by_group(safe, config.group_holdout, seed)
        toxic, toxic_unseen = sources.split_by_group(toxic, config.group_holdout, seed)
        unseen = (_shuffled(safe_unseen, seed), _shuffled(toxic_unseen, seed))
    safe, safe_left = _draw(safe, config.seemingly_toxic.count, seed, "data.seemingly_toxic.count")
    asked = None if ratio is None else round(ratio * len(safe))
    toxic, toxic_left = _draw(toxic, asked, seed, f"dcr.ratio={ratio}")
    for name, drawn in (("seemingly toxic", safe), ("toxic", toxic)):
        if not drawn:
            raise ConfigError(f"data: no {name} row is left for stage one; name another source")
    heldout = [
        (unseen[0] or safe_left)[:HELD_OUT_PAIRS],
        (unseen[1] or toxic_left)[:HELD_OUT_PAIRS],
    ]
    if not all(heldout):  # the paper trains on all of XSTest: one class alone has no pairs to watch
        heldout = [[], []]
    return replace(
        rows,
        seemingly_toxic=safe,
        toxic=toxic,
        seemingly_toxic_heldout=heldout[0],
        toxic_heldout=heldout[1],
        unseen_groups=sorted({row.group or row.id for part in unseen for row in part}),
    )


def _with_answers(
    rows: Splits,
    config: DataConfig,
    augment: AugmentConfig,
    seed: int,
    sift: Sift,
    refuses: Callable[..., bool],
) -> Splits:
    """STL-aug: answers to seemingly toxic prompts, `augment.repeat` times.

    They come from the file, all of them, or with the very prompts that stage one would draw.
    Evaluation sets that hold such a prompt become in-distribution.
    """
    named = augment.responses
    if named is None:
        found = sift.clean("seemingly_toxic", Kind.seemingly_toxic)
    else:
        read = augmentation.read_answers(named, config.root, refuses)
        found = sift.answers(read, named)
    found, unseen = sources.split_by_group(found, config.group_holdout, seed)
    if named is None:
        count = config.seemingly_toxic.count
        found, _ = _draw(found, count, seed, "data.seemingly_toxic.count")
        found = augmentation.answered(found, config, refuses)
    pairs = (rows.normal, rows.refusals, rows.normal_heldout, rows.refusals_heldout)
    left = augmentation.apart_from(found, [row for part in pairs for row in part])
    if len(left) < len(found):
        sift.dropped["augmented: is a prompt of SFT already"] += len(found) - len(left)
    if not left:
        raise ConfigError(
            f"stl_aug.responses={named}: every row is a prompt of SFT or of an evaluation set; "
            "give others, or name the set that they answer in data.seemingly_toxic.source"
        )
    return replace(
        rows,
        augmented=left * augment.repeat,
        in_distribution=sorted({*rows.in_distribution, *sift.holding(left)}),
        unseen_groups=sorted({row.group or row.id for row in unseen}),
    )


def _with_response(rows: list[Example], key: str) -> list[Example]:
    answered = [row for row in rows if row.response]
    if rows and not answered:
        raise ConfigError(f"{key}.source: its rows have no response; name a source of pairs")
    return answered


def _draw(
    rows: list[Example], count: int | None, seed: int, key: str
) -> tuple[list[Example], list[Example]]:
    """`count` rows (all for None) and those left, both in drawn order."""
    if count is not None and count > len(rows):
        raise ConfigError(f"{key} asks for {count} rows: only {len(rows)} are left; ask for fewer")
    drawn = _shuffled(rows, seed)
    return drawn[:count], drawn[count:] if count is not None else []


def _shuffled(rows: list[Example], seed: int) -> list[Example]:
    return sources.draw(rows, len(rows), seed)


def warn_of_forms(rows: Splits) -> str | None:
    """One line when the two classes differ plainly in grammatical form, else None."""
    return sources.form_gap(rows.seemingly_toxic, rows.toxic)


def row_record(rows: Splits) -> Mapping[str, object]:
    """Ids and fingerprint of every list of rows, for the run folder."""
    recorded: dict[str, dict[str, object]] = {
        name: {
            "count": len(part),
            "fingerprint": sources.fingerprint(part),
            "ids": [row.id for row in part],
        }
        for name, part in rows.parts().items()
    }
    if rows.augmented:  # theirs is no node of `data`
        recorded["augmented"]["sources"] = sorted({row.source for row in rows.augmented})
    return {
        "rows": recorded,
        "dropped": rows.dropped,
        "in_distribution": rows.in_distribution,
        "unseen_groups": rows.unseen_groups,
    }


# Lists of rows in `rows.json`: the config node and kind they came from, whether answers are learnt.
LEARNT = {
    "seemingly_toxic": ("seemingly_toxic", Kind.seemingly_toxic, False),
    "toxic": ("toxic", Kind.toxic, False),
    "normal": ("normal", Kind.normal, True),
    "refusals": ("safety", Kind.toxic, True),
    "augmented": (None, Kind.seemingly_toxic, True),
}


def trained_texts(data: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, list[str]]:
    """All that a run was trained on, by source: prompts, and the responses of stage two.

    `data` is the node of the run's `config.yaml` and `record` its `rows.json`. Raises DataError
    where a source has changed since.
    """
    texts: dict[str, list[str]] = {}
    for part, (node, kind, answers) in LEARNT.items():
        rows = record.get("rows", {}).get(part)
        if not rows or not rows["ids"]:
            continue
        names = rows["sources"] if node is None else data[node]["source"]
        for row in sources.read_rows(
            names, rows["ids"], kind, root=data["root"], expected=rows["fingerprint"]
        ):
            found = texts.setdefault(row.source, [])
            found.append(row.prompt)
            if answers and row.response:
                found.append(row.response)
    return texts
