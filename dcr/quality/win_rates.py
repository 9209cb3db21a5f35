"""AlpacaEval: the rate at which a judge prefers a model's answers to those of the STL run."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dcr import inference, resolving
from dcr.core import storage
from dcr.core.config import ConfigError, Kind
from dcr.core.config.evaluation import EvalConfig
from dcr.core.evaluation import PromptSet, read_set, set_name, subjects
from dcr.core.evaluation.protocols import Answers, Task, Work
from dcr.core.generation import Completion
from dcr.core.runs import Run
from dcr.endpoints import servers
from dcr.judges import AnnotatorConfig, pairwise
from dcr.judges.pairwise import Annotation, Pair
from dcr.quality import QualityConfig

ALPACA_EVAL_KEYS = (
    *("instruction", "output_1", "generator_1", "output_2", "generator_2"),
    *("annotator", "preference"),
)
PLAIN: dict[str, Any] = {  # greedy decoding alone, in the words of `gen`
    **dict.fromkeys(("self_cd", "adacd", "prefill", "thinking")), "repetition_penalty": 1.0,
}  # fmt: skip


class Quality(Task):
    """The win rate of answers to ordinary instructions."""

    closed = True

    def check(self, settings: EvalConfig, run: Run) -> None:
        """Raises ConfigError or EndpointError for a fault that would show only after answering.

        It looks at the annotator's prompt, parameters and key, and at the reference run's folder.
        """
        annotator = settings.node(AnnotatorConfig)
        pairwise.check(annotator)
        reference = settings.node(QualityConfig).reference
        if reference is None or not Run(Path(reference)).config_file.is_file():
            raise ConfigError(
                f"quality.reference={reference}: no config.yaml there; "
                "name the run folder of the STL run of the same model"
            )
        servers.check(annotator, "annotator")

    def prompts(self, settings: EvalConfig) -> list[PromptSet]:
        source, root = settings.node(QualityConfig).source, settings.data.root
        return [read_set(source, Kind.normal, root, settings.limit, settings.seed)]

    def measure(self, work: Work) -> dict[str, Any]:
        return win_rate(work.settings, work.run, work.asked, work.answers, work.folder)


def win_rate(
    settings: EvalConfig, run: Run, asked: Sequence[PromptSet], given: Answers, folder: Path
) -> dict[str, Any]:
    """The win rate against the reference run's plain answers, which are written there if missing.

    Plain answers are those without the edits and the decoding that the subject is evaluated under.
    """
    named = settings.node(QualityConfig)
    name, reference = set_name(named.source), Run(Path(str(named.reference)))
    beside = replace(
        settings.without("steering", "gate", "gating", "calibrate"),
        model=resolving.model_of(reference.config(), settings.model.trust_remote_code),
        run=str(reference.folder),
        gen=replace(settings.gen, **PLAIN),
    )
    subject = subjects.final(beside, reference)
    place = subject.folder
    if place.resolve() == folder.resolve():
        others = given
    else:
        rows = [b for b in asked if b.name == name]
        mine = reference.folder.resolve() == run.folder.resolve()  # locked already
        with nullcontext() if mine else storage.locked(reference.folder), subject:
            others = subject.answers(rows, place)
    labels = []
    for made_with in (run.config(), reference.config()):
        label = made_with["model"]["label"]
        labels.append(f"{label}-{made_with['method']}-seed{made_with['seed']}")
    progress = settings.trainer.progress
    names = labels[0], labels[1]
    return compared(given[name], others[name], settings, folder, names, progress)


def compared(
    given: Sequence[Completion],
    reference: Sequence[Completion],
    settings: EvalConfig,
    folder: Path,
    labels: tuple[str, str],
    progress: bool = True,
) -> dict[str, Any]:
    """The `quality` block of `metrics.json`: win rates of `given` over `reference`, in percent.

    Answers are paired by id and prompt; `missing` counts the prompts that only one side has.
    `labels` names the model and the reference. Annotations lie in `folder`/quality, one line each,
    beside `annotations.json`, `model_outputs.json` and `reference_outputs.json` in AlpacaEval's
    format. `error` and `invalid` annotations count in no rate; `identical` answers are ties within
    `n`. Without a scored comparison the rates are None.

    Raises ConfigError when no prompt has two answers, and what `pairwise.annotate` raises.
    """
    theirs = {(c.id, c.prompt): c.response for c in reference}
    own = {(c.id, c.prompt): c.response for c in given}
    quality, annotator = settings.node(QualityConfig), settings.node(AnnotatorConfig)
    pairs = [Pair(*key, theirs[key], response) for key, response in own.items() if key in theirs]
    if not pairs:
        raise ConfigError(
            f"quality.reference={quality.reference}: answers none of the {len(given)} "
            f"prompts of {quality.source}; evaluate both runs on the same source"
        )
    home, (model, other) = folder / "quality", labels
    storage.write_json(home / "model_outputs.json", _outputs(given, model, settings))
    storage.write_json(home / "reference_outputs.json", _outputs(reference, other, settings))
    rows = pairwise.annotate(pairs, settings, home, (other, model), progress)
    published = [
        {"dataset": quality.source, **{key: getattr(row, key) for key in ALPACA_EVAL_KEYS}}
        for row in rows
    ]
    storage.write_json(home / "annotations.json", published)
    return {
        **_rates([row for row in rows if row.status == "ok"]),
        **{status: sum(row.status == status for row in rows) for status in ("invalid", "error")},
        "identical": sum(not row.asked for row in rows),
        "missing": len(own.keys() ^ theirs.keys()),
        "annotator": annotator.model,
        "reference": other,
        "usage": servers.usage([row for row in rows if row.asked], annotator),
    }


def _rates(scored: Sequence[Annotation]) -> dict[str, Any]:
    """The rates over scored comparisons, with lengths in characters as in AlpacaEval."""
    preferences = [row.preference - 1 for row in scored if row.preference is not None]
    own, others = ([len(getattr(row, f"output_{i}")) for row in scored] for i in (2, 1))
    differences = [a - b for a, b in zip(own, others, strict=True)]
    rates = {
        name: None if math.isnan(rate) else rate
        for name, rate in vars(inference.win_rates(preferences)).items()
    }
    return {
        **rates,
        "length_controlled": inference.length_controlled_win_rate(preferences, differences),
        "n": len(scored),
        "mean_length": float(np.mean(own)) if scored else None,
        "reference_length": float(np.mean(others)) if scored else None,
    }


def _outputs(
    given: Sequence[Completion], generator: str, settings: EvalConfig
) -> list[dict[str, str]]:
    """The answers in the format of AlpacaEval's `--model_outputs` and `--reference_outputs`."""
    return [
        {
            "dataset": settings.node(QualityConfig).source,
            "instruction": answer.prompt,
            "output": answer.response,
            "generator": generator,
        }
        for answer in given
    ]
