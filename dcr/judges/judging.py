"""Judges: each response gets its verdict from the store, or its judge is asked once."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from dcr.core import extending, storage, text
from dcr.core.config import ConfigError, Kind, class_of, is_path
from dcr.core.config.evaluation import EvalConfig
from dcr.core.evaluation import PromptSet
from dcr.core.evaluation.protocols import Answers, Judge, Judged, Judges, Rules
from dcr.core.generation import Completion
from dcr.endpoints import ServerConfig, calls, servers
from dcr.endpoints.servers import EndpointError
from dcr.judges import GuardConfig
from dcr.judges.verdicts import (
    COMPLIANCE,
    SAFETY,
    Verdict,
    Verdicts,
    agreements,
    answer_fingerprint,
    by_keywords,
    counts,
    outcome_counts,
    outcomes,
    usage,
)
from dcr.outcomes import Outcome, version

KEPT_AT_ONCE = 64  # verdicts of a user's own judge
LABEL = re.compile(r"[\w-]+")  # it names a column and a score
IDENTITY_FILE = "judge.json"  # the settings that the verdicts beside it depend on
COMPLETION_LIMITS = ("max_tokens", "max_completion_tokens")  # newer models know only the second

Home = tuple[str, str]  # a set, and an answer's id in it


@dataclass(frozen=True)
class Judging:
    """A judge: its labels, checks, identity and verdicts. The node of its name has its settings.

    It stands beside its functions, and `dcr.extensions` names its place.

    Compliance is judged on prompts of any kind, harm on toxic prompts, which ask for it.
    """

    labels: tuple[str, ...]
    kinds: tuple[Kind, ...]
    check: Callable[[EvalConfig], None]
    identity: Callable[[EvalConfig], Mapping[str, object]]  # everything a verdict depends on
    verdicts: Callable[[EvalConfig, Sequence[Completion]], Verdicts]
    # the number of characters to send, for the estimate; None for a model on this machine
    characters: Callable[[EvalConfig, Sequence[Completion]], int] | None = None


BY_OUTCOME = Judging(
    labels=tuple(Outcome),
    kinds=tuple(Kind),
    check=lambda _: None,
    identity=lambda _: {"outcomes": version()},
    verdicts=lambda _, answers: outcomes(answers),
)


def judging_of(name: str, settings: EvalConfig) -> Judging:
    """One of ours by its name, or a user's own by its path."""
    if not is_path(name):
        return extending.ours(settings.table.judges[name])
    own = extending.made(name, Judge, "judge")
    labels = getattr(own, "labels", ())
    if not (isinstance(labels, tuple) and labels and all(map(LABEL.fullmatch, map(str, labels)))):
        raise ConfigError(
            f"judge={name}: needs labels, a tuple of all that it can say, of letters, digits, '_' "
            "and '-'"
        )
    return Judging(
        labels=own.labels,
        kinds=own.kinds,
        check=own.check,
        identity=lambda _: extending.origin(own),
        verdicts=lambda _, answers: _by_own(name, own, answers),
    )


def _by_own(name: str, judge: Judge, answers: Sequence[Completion]) -> Verdicts:
    """The word of a user's own judge, whose label stands in `raw` whatever it says."""
    labels = iter(judge.judge(answers))
    for start in range(0, len(answers), KEPT_AT_ONCE):
        batch = answers[start : start + KEPT_AT_ONCE]
        said = list(islice(labels, len(batch)))
        if start + len(batch) == len(answers) and [*islice(labels, 1)]:
            raise ConfigError(f"judge={name}: gives more labels than the {len(answers)} answers")
        if len(said) < len(batch):
            raise ConfigError(f"judge={name}: gives no label for {batch[len(said)].id}; say None")
        if unknown := [label for label in said if label not in (None, *judge.labels)]:
            raise ConfigError(f"judge={name}: says {unknown[0]!r}, which is none of its labels")
        yield [
            Verdict.on(
                answer,
                "invalid" if label is None else "ok",
                compliance=label if label in COMPLIANCE else None,
                safety=label if label in SAFETY else None,
                raw=label or "",
                asked=False,
            )
            for answer, label in zip(batch, said, strict=True)
        ]


class JudgeTable(Judges):
    """Our judges, and a user's own."""

    def check(self, names: Sequence[str], settings: EvalConfig) -> None:
        for name in names:
            judging_of(name, settings).check(settings)

    def judged(
        self,
        names: Sequence[str],
        settings: EvalConfig,
        sets: Sequence[PromptSet],
        answers: Answers,
        rules: Rules,
        folder: Path,
    ) -> Judged:
        counted: dict[str, dict[str, Any]] = {b.name: {} for b in sets}
        said: dict[str, Mapping[str, Sequence[Verdict]]] = {
            f"keyword:{name}": {b.name: by_keywords(answers[b.name], outcome) for b in sets}
            for name, outcome in rules.items()
        }
        spent = {}
        for name in names:
            judging, told = judging_of(name, settings), class_of(name)
            asked = {b.name: answers[b.name] for b in sets if b.kind in judging.kinds}
            verdicts = judge(name, settings, asked, folder, settings.trainer.progress)
            said[told] = verdicts
            node = node_of(name, settings)
            for of, rows in verdicts.items():
                if node:
                    counted[of][told] = counts(rows, judging.labels, {"model": node.model})
                elif is_path(name):
                    made = {"model": name, "own": judging.identity(settings)}
                    counted[of][told] = counts(rows, judging.labels, made)
                else:
                    counted[of][told] = outcome_counts(rows)
            if node:
                # all that it was asked about these answers, by earlier commands too
                stored = _stored(_place(name, judging.identity(settings), folder))
                spent[told] = usage(chain.from_iterable(stored.values()), node)
        agreement = agreements({b.name: b.kind for b in sets}, said)
        return Judged(counted, {"agreement": agreement, "usage": spent})


def node_of(name: str, settings: EvalConfig) -> ServerConfig | GuardConfig | None:
    """The model that judges, with its server or folder; None for rules and for a user's own."""
    return getattr(settings, name, None)


def judge(
    name: str,
    settings: EvalConfig,
    answers: Mapping[str, Sequence[Completion]],
    folder: Path,
    progress: bool = True,
) -> dict[str, list[Verdict]]:
    """A verdict for each answer of each set; the judge is asked only if `folder` holds none.

    Each verdict is stored as it arrives, so that a command that was killed asks only for those
    under way when it starts again. A response that stands in several sets is asked about once; a
    request that failed is made again by the next command. Raises EndpointError if no further
    request can succeed or none has, and UserError if nothing can be written; earlier verdicts stay
    stored.
    """
    judging = judging_of(name, settings)
    identity = judging.identity(settings)
    place = _place(name, identity, folder)
    homes: dict[str, list[Home]] = {}  # by fingerprint, the places of each distinct response
    by_content: dict[str, Completion] = {}
    for set_name, rows in answers.items():
        for answer in rows:
            content = answer_fingerprint(answer)
            homes.setdefault(content, []).append((set_name, answer.id))
            by_content[content] = answer
    by_answer = _settled(place, homes)
    waiting = [answer for content, answer in by_content.items() if content not in by_answer]
    _announce(name, settings, waiting, len(homes))

    def keep(verdicts: Sequence[Verdict]) -> None:
        if not (place / IDENTITY_FILE).is_file():
            storage.write_json(place / IDENTITY_FILE, identity)
        _append(place, [(verdict, home) for verdict in verdicts for home in homes[verdict.of]])

    if waiting:
        new = _asked(name, judging, settings, waiting, keep, progress)
        by_answer |= {verdict.of: verdict for verdict in new}
        if judging.characters:  # a server, whose answers come in any order
            calls.put_in_order(place, Verdict, answers)
    asked = [by_answer[content] for content in homes if by_answer[content].asked]
    if asked and not any(verdict.settled for verdict in asked):
        raise EndpointError(
            f"{name}: none of {len(asked):,} responses has a verdict (the first: "
            f"{asked[0].raw}); the answers are kept, and the same command asks again"
        )
    return {
        set_name: [replace(by_answer[answer_fingerprint(a)], id=a.id) for a in rows]
        for set_name, rows in answers.items()
    }


def _place(name: str, identity: Mapping[str, object], folder: Path) -> Path:
    """The folder of a judge's verdicts on answers in `folder`."""
    return folder / "verdicts" / f"{class_of(name)}-{storage.fingerprint(identity)}"


def _stored(place: Path) -> dict[str, list[Verdict]]:
    """The verdicts of a folder by set."""
    return {f.stem: storage.read_lines(f, Verdict) for f in sorted(place.glob("*.jsonl"))}


def _asked(
    name: str,
    judging: Judging,
    settings: EvalConfig,
    waiting: Sequence[Completion],
    keep: Callable[[Sequence[Verdict]], None],
    progress: bool,
) -> list[Verdict]:
    """The judge's verdicts on answers that have none; `keep` gets each batch as it arrives."""
    new: list[Verdict] = []
    bar = tqdm(total=len(waiting), unit="response", desc=class_of(name), disable=not progress)
    try:
        with closing(judging.verdicts(settings, waiting)) as batches, bar:
            for batch in batches:
                keep(batch)
                new += batch
                bar.update(len(batch))
    finally:
        _account(name, settings, new)
    return new


def _settled(place: Path, homes: Mapping[str, Sequence[Home]]) -> dict[str, Verdict]:
    """The verdicts that `place` holds, by answer; adds those of `homes` to the file of each set."""
    filed: set[tuple[str, Home]] = set()
    known: dict[str, Verdict] = {}
    for set_name, verdicts in _stored(place).items():
        for verdict in verdicts:
            if verdict.settled:
                filed.add((verdict.of, (set_name, verdict.id)))
                known[verdict.of] = verdict
    wanted = [(of, home) for of, each in homes.items() if of in known for home in each]
    _append(place, [(known[of], home) for of, home in wanted if (of, home) not in filed])
    return known


def _append(place: Path, verdicts: Sequence[tuple[Verdict, Home]]) -> None:
    """Appends each verdict to the file of its set, under its answer's id there."""
    by_set: dict[str, dict[Home, Verdict]] = {}
    for verdict, home in verdicts:
        by_set.setdefault(home[0], {})[home] = replace(verdict, id=home[1])
    for set_name, rows in by_set.items():
        storage.append_lines(place / f"{set_name}.jsonl", rows.values())


def _announce(name: str, settings: EvalConfig, waiting: Sequence[Completion], total: int) -> None:
    """Prints the number of requests to come, and their estimated cost."""
    if not waiting:
        print(f"{class_of(name)}: {total:,} verdicts, all stored")
        return
    node = node_of(name, settings)
    line = f"{class_of(name)}: {total - len(waiting):,} verdicts stored, {len(waiting):,} to ask"
    line += f" of {node.model if node else name}"
    characters = judging_of(name, settings).characters
    if not isinstance(node, ServerConfig) or not characters:
        print(line)
        return
    prompt = characters(settings, waiting) // text.CHARACTERS_PER_TOKEN
    limits = [n for key in COMPLETION_LIMITS if isinstance(n := node.parameters.get(key), int)]
    completion = len(waiting) * max(limits, default=0)
    print(
        f"{line}: about {prompt:,} tokens in"
        f"{f' and at most {completion:,} out' if completion else ''}"
        f"{usd(servers.spend(node, prompt, completion))}"
    )


def _account(name: str, settings: EvalConfig, new: Sequence[Verdict]) -> None:
    """Prints the number of new verdicts, and their requests, tokens and cost."""
    if not new or not (node := node_of(name, settings)):
        return
    spent = usage(new, node)
    by_status = Counter(verdict.status for verdict in new)
    print(
        f"{name}: {by_status['ok']:,} verdicts, {by_status['invalid']:,} invalid, "
        f"{by_status['error']:,} without an answer"
        f"{' (run again to ask for them)' if by_status['error'] else ''}; "
        f"{spent['requests']:,} requests, {spent['prompt_tokens']:,} tokens in, "
        f"{spent['completion_tokens']:,} out{usd(spent['usd'])}"
    )


def usd(amount: float | None) -> str:
    return "" if amount is None else f", {amount:.4f} USD"
