"""Calibration: a bias on the first token of refusals, so that a share of toxic prompts is refused.

Greedy decoding opens an answer with a refusal's token if the best of these lies above the best of
all others (`refusal.refusal_margin`); a bias b moves all margins by b. So a prompt has two answers,
whatever b: one from the best of the refusals' tokens, one from the best of the others. Calibration
begins both for every validation prompt and judges them by keywords, which gives the share of
refusals under every bias at once.
"""

import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import FiniteFloat
from typing_extensions import TypedDict

from dcr import resolving
from dcr.calibration import CalibrationConfig
from dcr.core import generation, storage
from dcr.core.config import ConfigError, Kind, Method
from dcr.core.config.evaluation import EvalConfig
from dcr.core.evaluation import PromptSet, kept, read_set, set_name, subjects
from dcr.core.evaluation.protocols import Change
from dcr.core.evaluation.subjects import Local
from dcr.core.generation import OpeningBias
from dcr.core.models import Policy
from dcr.core.prompts import ChatFormat
from dcr.core.refusal import opening as refusal
from dcr.core.runs import Run
from dcr.core.sources import Example

log = logging.getLogger(__name__)

BEYOND = 0.25  # logits beyond the last prompt, if every prompt is to be refused
TIE = math.ulp(0.0)  # the margin of a tie that opens a refusal: just above 0
BEGUN = 16  # tokens of an answer after which XSTest's keywords have decided


class NeverRefuses(ConfigError):
    """A model that no bias makes refuse."""


@dataclass(frozen=True)
class Beginnings:
    """The beginnings of a prompt's two answers: from a refusal's first token, and from another.

    Greedy decoding gives `refusing` if `margin` (`refusal.refusal_margin`) plus the bias is above
    0, else `answering`.
    """

    id: str
    prompt: str
    margin: FiniteFloat
    refusing: str
    answering: str

    def refused(self, bias: float) -> bool:
        """Whether XSTest's keywords call the answer under `bias` a refusal."""
        return refusal.is_refusal(self.refusing if self.margin + bias > 0 else self.answering)


class Place(TypedDict):
    """The place of the bias: it acts on `tokens` behind the tokens `lead`."""

    lead: list[int]
    tokens: list[int]


class Decoding(TypedDict, total=False):
    """The field of a generation config that calibration writes."""

    sequence_bias: list[tuple[list[int], float]] | None


def check(settings: EvalConfig, made_with: Mapping[str, Any]) -> None:
    """Raises ConfigError if `calibrate` is neither a share nor a run, and for prompts trained on.

    `made_with` is the configuration of the run that is calibrated.
    """
    if share_of(settings) is None and exported_bias(settings) is None:
        subjects.final(settings, _reference(settings))
    if made_with["method"] not in {method.value for method in Method}:
        return
    learnt = {
        f"data.{node}": made_with["data"].get(node, {}).get("source") or []
        for node in ("seemingly_toxic", "toxic", "safety", "normal")
    }
    readout = made_with.get("sft", {}).get("readout", {})
    if readout.get("steps"):
        learnt["sft.readout"] = [*readout["toxic"], *readout["seemingly_toxic"]]
    for node, named in learnt.items():
        trained_on = {named} if isinstance(named, str) else set(named)
        for kind in ("toxic", "seemingly_toxic"):
            if both := trained_on & set(getattr(settings.node(CalibrationConfig), kind)):
                raise ConfigError(
                    f"calibration.{kind}=[{min(both)}]: the run was trained on it ({node}); "
                    "name prompts of another origin"
                )


def label(settings: EvalConfig) -> str:
    """The target in records and tables: a share, or the name of a run's folder."""
    share = share_of(settings)
    return Path(str(settings.calibrate)).resolve().name if share is None else f"{share:g}"


def share_of(settings: EvalConfig) -> float | None:
    """The target if it is a number. Raises ConfigError for a number that is no share."""
    try:
        share = float(str(settings.calibrate))
    except ValueError:
        return None
    if not 0 < share <= 1:
        raise ConfigError(
            f"calibrate={settings.calibrate}: give a share of toxic prompts above 0, at most 1, or "
            "the folder of a run to be as safe as"
        )
    return share


def exported_bias(settings: EvalConfig) -> float | None:
    """The bias of a calibrated export, if `calibrate` names its folder; ConfigError if it has none.

    A model that was trained further from the export is so evaluated under the same bias.
    """
    file = Path(str(settings.calibrate)) / "generation_config.json"
    if not file.is_file():
        return None
    written = storage.read_json(file, Decoding, "name another calibrated export")
    biases = {bias for _, bias in written.get("sequence_bias") or ()}
    if len(biases) != 1:
        raise ConfigError(
            f"calibrate={settings.calibrate}: its generation_config.json holds no bias of ours; "
            "name an export made with calibrate=, a run folder or a share"
        )
    return biases.pop()


def _reference(settings: EvalConfig) -> Run:
    run = Run(Path(str(settings.calibrate)))
    if not run.config_file.is_file():
        raise ConfigError(
            f"calibrate={settings.calibrate}: neither a share such as 0.9 nor a run folder with a "
            "config.yaml"
        )
    return run


class Calibrated(Change):
    """Answers under the bias that `calibrate` asks for."""

    def check(self, settings: EvalConfig, run: Run) -> None:
        check(settings, run.config() if settings.run else {"method": "base"})
        first, *_ = subjects.subjects(settings, run)
        first.check_prompts(validation(settings))

    def recorded(self, settings: EvalConfig) -> dict[str, Any]:
        return {"calibrate": label(settings)}

    def identity(self, subject: Local) -> dict[str, object]:
        return {}  # the subject's own identity has the bias

    def prepared(self, subject: Local) -> dict[str, Any]:
        """Gives the subject its bias, chosen on validation prompts beside its plain answers."""
        plain = subject.folder
        by_set = stored_beginnings(subject, validation(subject.settings), plain)
        place = stored_place(subject, plain)
        subject.bias, record = choose_bias(subject.settings, place, by_set)
        for edits in plain.glob("steering.json"):
            storage.write_bytes(subject.folder / edits.name, edits.read_bytes())
        return {"calibration": record}


def stored_place(subject: Local, folder: Path) -> Place:
    """The `opening_place` of a subject; `folder` keeps it, so that not each command opens weights.

    Raises ConfigError as that does.
    """
    file = folder / "opening.json"
    if not file.is_file():
        storage.write_json(file, opening_place(subject.plain_chat()))
    return storage.read_json(file, Place)


def validation(settings: EvalConfig, limit: int | None = None) -> list[PromptSet]:
    """The prompts that choose a bias or a strength; no test and no extraction uses them."""
    return [
        read_set(source, kind, settings.data.root, limit, settings.seed)
        for kind in (Kind.toxic, Kind.seemingly_toxic)
        for source in getattr(settings.node(CalibrationConfig), kind.value)
    ]


def stored_beginnings(
    subject: Local, sets: Sequence[PromptSet], folder: Path
) -> dict[str, list[Beginnings]]:
    """The beginnings for every prompt; `folder` keeps them, and only missing ones are generated."""

    def ask(rows: list[Example]) -> Iterator[list[Beginnings]]:
        most = subject.settings.gen.most
        return beginnings(subject.policy(), subject.plain_chat(), rows, most)

    subject.begin(sets, folder)
    progress = subject.settings.trainer.progress
    return kept(sets, ask, folder / "forks", Beginnings, "reading", progress)


def beginnings(
    policy: Policy, chat: ChatFormat, rows: Sequence[Example], max_new_tokens: int
) -> Iterator[list[Beginnings]]:
    """Decodes both beginnings of every row's answer greedily, the rows in any order.

    Raises DataError for a prompt longer than the model's context.
    """
    for batch in both_answers(policy, chat, rows, min(max_new_tokens, BEGUN)):
        yield [
            Beginnings(
                two.row.id,
                two.row.prompt,
                two.margin,
                generation.text(chat, two.refusing),
                generation.text(chat, two.answering),
            )
            for two in batch
        ]


@dataclass(frozen=True)
class Two:
    """The token ids of a prompt's two answers: from a refusal's first token, and from another.

    `margin` and `mass` are the prompt's `refusal.refusal_margin` and `refusal.refusal_mass`.
    """

    row: Example
    margin: float
    mass: float
    refusing: list[int]
    answering: list[int]


def both_answers(
    policy: Policy, chat: ChatFormat, rows: Sequence[Example], new: int
) -> Iterator[list[Two]]:
    """Decodes both answers of every row greedily, `new` tokens each, the rows in any order.

    Raises DataError for a prompt longer than the model's context.
    """
    encoded = [(row, chat.prompt_ids(row.prompt)) for row in rows]
    generation.check_context(policy, encoded, new)
    openings = refusal.refusal_openings(chat)
    for places, logits in refusal.first_logits(policy.model, [ids for _, ids in encoded]):
        refusals = openings[logits[:, openings.to(logits.device)].argmax(-1).cpu()].tolist()
        others = logits.index_fill(1, openings.to(logits.device), -math.inf).argmax(-1).tolist()
        firsts = list(zip(refusals, others, strict=True))
        margins = [
            TIE if margin == 0 and refusing < answering else margin  # greedy takes the lower id
            for margin, (refusing, answering) in zip(
                refusal.refusal_margin(logits, openings).tolist(), firsts, strict=True
            )
        ]
        masses = refusal.refusal_mass(logits, openings).tolist()
        begun = [
            [*encoded[i][1], token]
            for i, both in zip(places, firsts, strict=True)
            for token in both
        ]
        answers = iter(_answers(policy, chat, begun, new))
        yield [
            Two(encoded[i][0], margin, mass, next(answers), next(answers))
            for i, margin, mass in zip(places, margins, masses, strict=True)
        ]


def _answers(
    policy: Policy, chat: ChatFormat, begun: Sequence[Sequence[int]], new: int
) -> list[list[int]]:
    """The token ids of answers whose first token is the last one of each of `begun`."""
    further: list[list[int]] = []
    size = generation.batch_size(policy.model, max(map(len, begun)), new)
    for start in range(0, len(begun), size):
        batch = begun[start : start + size]
        further += generation.continued(policy, chat, batch, new, lambda logits: logits[:, 0])[0]
    return [[ids[-1], *more][:new] for ids, more in zip(begun, further, strict=True)]


def opening_place(chat: ChatFormat) -> Place:
    """The place of a bias on this template's answers.

    Raises ConfigError for a template without a token between a user's words and the answer.
    """
    lead = chat.lead()
    if not lead:
        raise ConfigError(
            "calibrate, gate: no token of the chat template stands between the user's words and "
            "the answer, so a bias cannot find its beginning; name another model.template"
        )
    if lead[0] not in chat.stop:
        log.warning(
            "calibrate, gate: no end token stands before %r in the chat template: the bias acts a "
            "second time in an answer that holds these words",
            chat.tokenizer.decode(lead),
        )
    return Place(lead=lead, tokens=refusal.refusal_openings(chat).tolist())


def calibrated(
    policy: Policy, chat: ChatFormat, settings: EvalConfig
) -> tuple[OpeningBias, dict[str, Any]]:
    """The bias that `calibrate` asks for, chosen on weights that are open, and its record.

    Raises ConfigError as `choose_bias` and `opening_place` do.
    """
    return choose_bias(settings, opening_place(chat), read_beginnings(policy, chat, settings))


def read_beginnings(
    policy: Policy, chat: ChatFormat, settings: EvalConfig
) -> dict[str, list[Beginnings]]:
    """The beginnings of the answers to the validation prompts, by set, from weights in memory."""
    new = settings.gen.most
    return {
        asked.name: [row for batch in beginnings(policy, chat, asked.rows, new) for row in batch]
        for asked in validation(settings)
    }


def choose_bias(
    settings: EvalConfig, place: Place, by_set: Mapping[str, Sequence[Beginnings]]
) -> tuple[OpeningBias, dict[str, Any]]:
    """The bias for the beginnings of the validation sets, by name, and its record.

    Raises NeverRefuses if no bias makes the model refuse; logs a warning if it refuses too rarely
    under every bias.
    """

    def rows_of(names: Sequence[str]) -> list[Beginnings]:
        return [row for name in names for row in by_set[set_name(name)]]

    toxic, exported = rows_of(settings.node(CalibrationConfig).toxic), None
    if (share := share_of(settings)) is None:
        exported = exported_bias(settings)
    if exported is not None:
        share = sum(row.refused(exported) for row in toxic) / len(toxic)
    share = reference_share(settings) if share is None else share
    bias = bias_for(toxic, share) if exported is None else exported
    reached = sum(row.refused(bias) for row in toxic)
    if not reached and exported is None:
        raise NeverRefuses(
            f"calibrate={settings.calibrate}: no bias makes this model refuse one of {len(toxic)} "
            "toxic validation prompts; train it to refuse first"
        )
    if reached < share * len(toxic) - 1e-6:
        log.warning(
            "calibrate=%s: no bias refuses more than %d of %d toxic validation prompts; behind the "
            "first tokens of refusals this model also answers. Train it to refuse, or lower the "
            "share",
            settings.calibrate,
            reached,
            len(toxic),
        )
    counts = {
        name: {
            "kind": kind,
            "n": len(rows),
            "plain": sum(row.refused(0) for row in rows),
            "refused": sum(row.refused(bias) for row in rows),
            "opened": sum(row.margin + bias > 0 for row in rows),
        }
        for kind in ("toxic", "seemingly_toxic")
        for name in getattr(settings.node(CalibrationConfig), kind)
        for rows in [rows_of([name])]
    }
    named = None if share_of(settings) else label(settings)
    record = {"target": share, "run": named, "bias": bias, "sets": counts}
    return OpeningBias(tuple(place["lead"]), tuple(place["tokens"]), bias), record


def bias_for(rows: Sequence[Beginnings], share: float) -> float:
    """The smallest bias that refuses at least `share` of the prompts and the fewest beyond that.

    If no bias refuses as many, the bias refuses as many as any does. It is 0 if that gives the same
    answers, else it lies in the middle between two margins, so that the rounding of another batch
    changes neither.
    """
    margins = [-math.inf, *sorted({row.margin for row in rows}), math.inf]
    thresholds = [  # answers of margins above them open with a refusal's token
        0.0 if low <= 0 < high else _between(low, high) for low, high in itertools.pairwise(margins)
    ]
    refused = [sum(row.refused(-threshold) for row in rows) for threshold in thresholds]
    enough = min(math.ceil(share * len(rows) - 1e-9), max(refused))
    fewest = min(count for count in refused if count >= enough)
    return 0.0 - min((t for t, n in zip(thresholds, refused, strict=True) if n == fewest), key=abs)


def _between(low: float, high: float) -> float:
    if math.isinf(low):
        return high - BEYOND
    return low + BEYOND if math.isinf(high) else (low + high) / 2


def reference_share(settings: EvalConfig) -> float:
    """The share of the toxic prompts that the reference run refuses in its plain answers.

    Raises ConfigError where it refuses none.
    """
    run = _reference(settings)
    beside = replace(
        settings.without("steering"),
        model=resolving.model_of(run.config(), settings.model.trust_remote_code),
        run=str(run.folder),
    )
    toxic = [b for b in validation(settings) if b.kind is Kind.toxic]
    subject = subjects.final(beside, run)
    with subject:
        by_set = stored_beginnings(subject, toxic, subject.folder)
    rows = [row for part in by_set.values() for row in part]
    refused = sum(row.refused(0) for row in rows)
    if not refused:
        raise ConfigError(
            f"calibrate={settings.calibrate}: that run refuses none of {len(rows)} toxic "
            "prompts; give a share such as 0.9"
        )
    return refused / len(rows)
