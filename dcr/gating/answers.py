"""Answers behind a gate: its fixed words to prompts above the threshold, else the model's.

The gate alone decides, unless `gating.alone=false`: below the threshold a bias keeps answers from
opening with a refusal's first token, whatever the model would say. A prompt's refusal mass is the
gate's probability. `calibrate` chooses the threshold: the highest at which gate and model together
refuse the share of toxic validation prompts.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import FiniteFloat

from dcr.calibration import CalibrationConfig, biases
from dcr.calibration.biases import Beginnings
from dcr.core import storage
from dcr.core.config import ConfigError
from dcr.core.config.evaluation import EvalConfig
from dcr.core.evaluation import PromptSet, kept, set_name
from dcr.core.evaluation.protocols import Ask, Change, Masses
from dcr.core.evaluation.subjects import Local
from dcr.core.generation import Completion, OpeningBias
from dcr.core.models import Policy
from dcr.core.prompts import ChatFormat
from dcr.core.runs import Run
from dcr.core.sources import Example
from dcr.gating import SHUT, GatingConfig, Record, classifier, folder_of
from dcr.public import SOURCES

PLACE = "gates"  # in a run's folder: scores by gate and set, which no threshold changes
AT_ONCE = 256  # prompts that are scored before they are stored


@dataclass(frozen=True)
class Scored:
    """The probability by a gate that a prompt is toxic."""

    id: str
    prompt: str
    score: FiniteFloat


class Gated(Change):
    """Answers behind the gate that `gate` names."""

    def check(self, settings: EvalConfig, run: Run) -> None:
        check(settings, run.config() if settings.run else {"method": "base"})

    def recorded(self, settings: EvalConfig) -> dict[str, Any]:
        node = settings.node(GatingConfig)
        about: dict[str, Any] = {"name": folder_of(settings).resolve().name, "alone": node.alone}
        if settings.calibrate is not None:
            return {"gate": about, "calibrate": biases.label(settings)}
        return {"gate": about | {"threshold": threshold_of(settings)}}

    def identity(self, subject: Local) -> dict[str, object]:
        folder = folder_of(subject.settings)
        words = classifier.record_of(folder)["refusal"]
        threshold = threshold_of(subject.settings)
        return {"gate": [storage.weights_fingerprint(folder), words, threshold]}

    def prepared(self, subject: Local) -> dict[str, Any]:
        """Gives the subject its threshold, and the bias with which the gate decides alone."""
        settings, blocks = subject.settings, dict[str, Any]()
        node = settings.node(GatingConfig)
        bare = subject.under(settings.without("gate", "gating", "calibrate"))
        plain = bare.folder
        if settings.calibrate is not None:
            asked = biases.validation(settings)
            begun = biases.stored_beginnings(bare, asked, plain)
            scores = self.masses(subject, asked, plain)
            threshold, blocks["calibration"] = choose_threshold(settings, begun, scores)
            node = replace(node, threshold=threshold)
            subject.settings = replace(settings, gating=node)  # pyright: ignore[reportCallIssue]
        if node.alone:
            subject.bias = shut(biases.stored_place(bare, plain))
        for edits in plain.glob("steering.json"):
            storage.write_bytes(subject.folder / edits.name, edits.read_bytes())
        return blocks

    def answering(self, subject: Local, asked: Sequence[PromptSet], folder: Path, ask: Ask) -> Ask:
        threshold = threshold_of(subject.settings)
        words = classifier.record_of(folder_of(subject.settings))["refusal"]
        scores = {row.prompt: row.score for rows in scored(subject, asked).values() for row in rows}

        def behind(rows: list[Example]) -> Iterator[list[Completion]]:
            above = [row for row in rows if scores[row.prompt] > threshold]
            yield [Completion(r.id, r.prompt, words, 0, True, scores[r.prompt]) for r in above]
            below = [row for row in rows if scores[row.prompt] <= threshold]
            for batch in ask(below) if below else ():
                yield [replace(answer, refusal_mass=scores[answer.prompt]) for answer in batch]

        return behind

    def masses(self, subject: Local, asked: Sequence[PromptSet], folder: Path) -> Masses:
        return {
            name: {row.id: row.score for row in rows}
            for name, rows in scored(subject, asked).items()
        }

    def made_from(self, settings: EvalConfig, sets: Sequence[PromptSet]) -> dict[str, int]:
        """Counts each set's prompts of sources that the gate was trained on."""
        known = learnt(classifier.record_of(folder_of(settings)))
        counts = {of.name: sum(called(row.source) in known for row in of.rows) for of in sets}
        return {name: count for name, count in counts.items() if count}  # steering counts others


def learnt(record: Record) -> set[str]:
    """The sources that a gate was trained on, by the names that its record has for them."""
    parts = record["made_with"].get("pairs", {}).items()
    return {n for kind, of in parts if not kind.endswith("heldout") for n in of["sources"]}


def called(source: str) -> str:
    """A source's name in a gate's record, which names a file without the folders it lay in."""
    return source if source in SOURCES else Path(source).name


def shut(place: biases.Place) -> OpeningBias:
    """The bias under which no answer opens with a refusal's first token."""
    return OpeningBias(tuple(place["lead"]), tuple(place["tokens"]), SHUT)


def threshold_of(settings: EvalConfig) -> float:
    """The threshold that is set or was chosen, else the gate's own."""
    given = settings.node(GatingConfig).threshold
    return classifier.record_of(folder_of(settings))["threshold"] if given is None else given


def scored(subject: Local, asked: Sequence[PromptSet]) -> dict[str, list[Scored]]:
    """The scores of the prompts of each set; the run keeps them, and missing ones open the gate."""
    settings, folder = subject.settings, folder_of(subject.settings)
    of = [storage.weights_fingerprint(folder), settings.precision.value]

    def ask(rows: list[Example]) -> Iterator[list[Scored]]:
        trusted, accelerator = settings.model.trust_remote_code, settings.trainer.accelerator
        gate = classifier.open_gate(folder, settings.precision, accelerator, trusted)
        for start in range(0, len(rows), AT_ONCE):
            part = rows[start : start + AT_ONCE]
            scores = gate.scores([row.prompt for row in part])
            yield [Scored(row.id, row.prompt, s) for row, s in zip(part, scores, strict=True)]

    place = subject.run.folder / PLACE / storage.fingerprint(of)
    return kept(asked, ask, place, Scored, "scoring", settings.trainer.progress)


# --- calibration ----------------------------------------------------------------------------------


def check(settings: EvalConfig, made_with: Mapping[str, Any]) -> None:
    """Raises ConfigError if there is no gate, or if `calibrate` cannot choose a threshold.

    It cannot on prompts that the gate or the run was trained on. `made_with` is the configuration
    of the run behind the gate, as in `biases.check`.
    """
    record = classifier.record_of(folder_of(settings))
    if settings.calibrate is None:
        return
    biases.check(settings, made_with)
    if biases.share_of(settings) is None and biases.exported_bias(settings) is not None:
        raise ConfigError(
            f"calibrate={settings.calibrate}: this folder holds a bias, and a gate needs a "
            "threshold; give a share such as 0.8, or a run whose share is to be reached"
        )
    for kind in ("toxic", "seemingly_toxic"):
        named = getattr(settings.node(CalibrationConfig), kind)
        if both := learnt(record) & {called(name) for name in named}:
            raise ConfigError(
                f"calibration.{kind}=[{min(both)}]: the gate was trained on it; name prompts of "
                "another origin"
            )


def rule(
    policy: Policy, chat: ChatFormat, settings: EvalConfig
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The `gate.json` for a gate in front of these open weights, under these settings.

    If `calibrate` is set, it chooses the threshold on these weights, and the record of the choice
    is returned as well. For a gate that decides alone the file holds its bias as `sequence_bias`.
    """
    record, threshold = None, threshold_of(settings)
    if settings.calibrate is not None:
        trusted, precision = settings.model.trust_remote_code, settings.precision
        folder = folder_of(settings)
        gate = classifier.open_gate(folder, precision, trust_remote_code=trusted)
        scores = {
            asked.name: dict(zip([row.id for row in asked.rows], found, strict=True))
            for asked in biases.validation(settings)
            for found in [gate.scores([row.prompt for row in asked.rows])]
        }
        begun = biases.read_beginnings(policy, chat, settings)
        threshold, record = choose_threshold(settings, begun, scores)
    alone = settings.node(GatingConfig).alone
    bias = shut(biases.opening_place(chat)).sequences if alone else None
    known = classifier.record_of(folder_of(settings))
    return {**known, "threshold": threshold, "sequence_bias": bias}, record


def choose_threshold(
    settings: EvalConfig,
    begun: Mapping[str, Sequence[Beginnings]],
    scores: Mapping[str, Mapping[str, float]],
) -> tuple[float, dict[str, Any]]:
    """The threshold that `calibrate` asks for, and its record, from the validation sets by name.

    `begun` has both beginnings of the model's answers, `scores` the gate's probabilities by id.
    """
    node, alone = settings.node(CalibrationConfig), settings.node(GatingConfig).alone
    own = SHUT if alone else 0.0  # the bias that the model answers under

    def rows_of(names: Sequence[str]) -> list[tuple[float, bool]]:
        return [
            (scores[name][row.id], row.refused(own))
            for name in map(set_name, names)
            for row in begun[name]
        ]

    share = biases.share_of(settings)
    run = biases.label(settings) if share is None else None
    if share is None:
        share = biases.reference_share(settings.without("gate", "gating"))
    threshold = threshold_for(rows_of(node.toxic), share)
    counts = {
        name: {
            "kind": kind,
            "n": len(rows),
            "plain": sum(row.refused(0) for row in begun[set_name(name)]),
            "refused": sum(score > threshold or refused for score, refused in rows),
            "opened": sum(score > threshold for score, _ in rows),
        }
        for kind in ("toxic", "seemingly_toxic")
        for name in getattr(node, kind)
        for rows in [rows_of([name])]
    }
    return threshold, {"target": share, "run": run, "threshold": threshold, "sets": counts}


def threshold_for(rows: Sequence[tuple[float, bool]], share: float) -> float:
    """The highest threshold at which at least `share` of the prompts are refused.

    Each row has a prompt's score, which refuses it above the threshold, and whether the model
    refuses it anyhow. The threshold lies in the middle between two scores, so that rounding does
    not change what it refuses; it is 1, above which no score lies, where the model refuses enough.
    """
    scores = sorted((score for score, refused in rows if not refused), reverse=True)
    needed = math.ceil(share * len(rows) - 1e-9) - (len(rows) - len(scores))
    if needed <= 0:
        return 1.0
    last = scores[needed - 1]
    return (last + next((score for score in scores if score < last), 0.0)) / 2
