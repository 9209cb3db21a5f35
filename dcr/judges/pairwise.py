"""Pairwise comparison: one token of an annotator says which of two answers is better.

As in AlpacaEval 2's weighted annotators (Dubois et al. 2024), the annotator sees the answers as `m`
and `M` in random order, and the preference is the probability of one letter among the two. Stored
rows have AlpacaEval's keys, so that its own tools read them.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from dcr.core import storage
from dcr.core.config import ConfigError
from dcr.core.config.evaluation import EvalConfig
from dcr.core.text import CHARACTERS_PER_TOKEN, label_of
from dcr.endpoints import HTTPConfig, calls, servers
from dcr.endpoints.answers import Failure, Message, Reply
from dcr.endpoints.servers import EndpointError
from dcr.judges import AnnotatorConfig
from dcr.judges.judging import usd
from dcr.judges.verdicts import filled, transcript, wording

PLACES = ("instruction", "output_1", "output_2")
TURN = re.compile(r"<\|im_start\|>(system|user|assistant)\n(.*?)<\|im_end\|>", re.DOTALL)
FIRST, SECOND = "m", "M"  # the names of the answers, in the order shown
AROUND = " \t\r\nĠĊ▁"  # white space around a letter, also as byte-level and SentencePiece spell it


@dataclass(frozen=True)
class Pair:
    """Two answers to one instruction: the reference's and the model's."""

    id: str
    instruction: str
    reference: str
    answer: str


@dataclass(frozen=True)
class Annotation:
    """One comparison; `output_1` is by the reference, `output_2` by the model, as in AlpacaEval.

    `preference` runs from 1 (the reference's answer is better) to 2 (the model's); None unless
    `status` is ok. `of` is the fingerprint of the instruction and both answers in the order shown.
    """

    id: str
    of: str
    status: str  # ok; error: nothing came back; invalid: neither letter among the likeliest tokens
    instruction: str
    output_1: str
    output_2: str
    generator_1: str
    generator_2: str
    annotator: str
    preference: float | None = None
    is_switched: bool = False  # the model's answer was shown first
    asked: bool = True  # False: equal answers, a tie without a request
    raw: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0


def turns(settings: AnnotatorConfig) -> list[Message]:
    """The annotator's prompt as chat messages, from its file, which is in AlpacaEval's format.

    Turns stand between `<|im_start|>role` and `<|im_end|>`; a file without them is one user turn.
    Raises ConfigError if the file cannot be read or lacks a placeholder.
    """
    text = wording("annotator.prompt", settings.prompt, "pairwise.txt", *PLACES)
    messages = [{"role": role, "content": body.strip()} for role, body in TURN.findall(text)]
    if messages and TURN.sub("", text).strip():
        raise ConfigError(
            f"annotator.prompt={settings.prompt}: has text outside <|im_start|>role … <|im_end|>; "
            "move it into a turn, or leave these marks out"
        )
    return [*messages] or [{"role": "user", "content": text.strip()}]


def check(settings: AnnotatorConfig) -> None:
    """Raises ConfigError for settings under which no comparison can succeed."""
    turns(settings)
    parameters = settings.parameters
    if parameters.get("logprobs") is not True:
        raise ConfigError(
            f"annotator.parameters.logprobs={parameters.get('logprobs')}: preferences are read off "
            "log-probabilities; give true"
        )
    top = parameters.get("top_logprobs")
    if not isinstance(top, int) or isinstance(top, bool) or top < 2:
        raise ConfigError(
            f"annotator.parameters.top_logprobs={top}: both letters must fit in; "
            "give 2 or more (AlpacaEval: 5)"
        )


def store(settings: AnnotatorConfig, folder: Path) -> Path:
    """The file of this annotator's answers under this prompt and these parameters."""
    identity = [settings.url, settings.model, settings.parameters, turns(settings)]
    return folder / f"{label_of(settings.model)}-{storage.fingerprint(identity)}.jsonl"


def annotate(
    pairs: Sequence[Pair],
    settings: EvalConfig,
    folder: Path,
    generators: tuple[str, str],
    progress: bool = True,
) -> list[Annotation]:
    """One annotation a pair, in order. `generators` names the reference's model and the other.

    An answer is stored before the next is waited for, and never asked for again; an error is. Equal
    answers are a tie without a request, so a model against itself ties everywhere. Raises
    EndpointError if every request would fail alike or has failed, UserError if nothing can be
    written, and DataError, naming the line, for a stored line that is no annotation.
    """
    file = store(settings.node(AnnotatorConfig), folder)
    stored = {row.of: row for row in storage.read_lines(file, Annotation)}  # the latest of each
    known = {of: row for of, row in stored.items() if row.status != "error"}
    drafts = [_draft(pair, generators, settings) for pair in pairs]
    missing = {d.of: d for d in drafts if d.asked and d.of not in known}
    print(f"annotator: {len(drafts):,} comparisons, {len(missing):,} to ask", flush=True)
    with tqdm(
        total=len(missing), unit="pair", desc="comparing answers", disable=not progress
    ) as bar:
        for row in _asked(list(missing.values()), settings):
            storage.append_lines(file, [row])
            known[row.of] = row
            bar.update()
    rows = [_merged(known[d.of], d) if d.asked else d for d in drafts]
    asked = [row for row in rows if row.asked]
    if asked and all(row.status == "error" for row in asked):
        raise EndpointError(
            f"annotator: none of {len(asked):,} comparisons was answered (the first: "
            f"{asked[0].raw}); the answers are kept, and the same command asks again"
        )
    return rows


def preference(top: Mapping[str, float], switched: bool) -> float | None:
    """The preference from 1 to 2 for `output_2`: 2 - p(m) / (p(m) + p(M)), or, switched, 1 + it.

    `switched` says that `output_2` was shown first. `top` has log-probabilities by token; the
    spellings of a letter count together, and a missing letter has probability 0. None if both are
    missing.
    """
    first, second = (
        np.logaddexp.reduce([p for token, p in top.items() if token.strip(AROUND) == letter])
        for letter in (FIRST, SECOND)
    )
    either = np.logaddexp(first, second)
    if not math.isfinite(either):
        return None
    share = float(np.exp(first - either))
    return 1 + share if switched else 2 - share


def is_switched(id: str, seed: int) -> bool:
    """Whether the model's answer is shown first: a fair coin, the same for one id and seed."""
    return hashlib.sha256(f"order:{seed}:{id}".encode()).digest()[0] % 2 == 1


def _draft(pair: Pair, generators: tuple[str, str], settings: EvalConfig) -> Annotation:
    """The annotation before its answer; equal answers are a tie at once."""
    switched, equal = is_switched(pair.id, settings.seed), pair.reference == pair.answer
    shown = (pair.answer, pair.reference) if switched else (pair.reference, pair.answer)
    return Annotation(
        id=pair.id,
        of=storage.fingerprint([pair.instruction, *shown]),
        status="ok",
        instruction=pair.instruction,
        output_1=pair.reference,
        output_2=pair.answer,
        generator_1=generators[0],
        generator_2=generators[1],
        annotator=settings.node(AnnotatorConfig).model,
        preference=1.5 if equal else None,
        is_switched=switched,
        asked=not equal,
    )


def _asked(drafts: Sequence[Annotation], settings: EvalConfig) -> Iterator[Annotation]:
    """Prints an estimate of the cost, then gives the drafts with answers in order of arrival."""
    if not drafts:
        return
    server = settings.node(AnnotatorConfig)
    template = turns(server)
    conversations = [_conversation(template, draft) for draft in drafts]
    characters = sum(len(turn["content"]) for asked in conversations for turn in asked)
    tokens = characters // CHARACTERS_PER_TOKEN
    price = usd(servers.spend(server, tokens, len(drafts)))
    print(f"annotator: about {tokens:,} tokens to {server.model}{price}", flush=True)
    arriving = calls.chats(server, settings.node(HTTPConfig), conversations, node="annotator")
    with closing(arriving):
        for index, answer in arriving:
            yield _answered(drafts[index], answer, server)


def _conversation(template: Sequence[Message], draft: Annotation) -> list[Message]:
    shown = (draft.output_1, draft.output_2)
    first, second = reversed(shown) if draft.is_switched else shown
    texts = {"instruction": transcript(draft.instruction), "output_1": first, "output_2": second}
    return [{**turn, "content": filled(turn["content"], **texts)} for turn in template]


def _answered(draft: Annotation, answer: Reply | Failure, server: AnnotatorConfig) -> Annotation:
    if isinstance(answer, Failure):
        return replace(draft, status=answer.status, raw=answer.reason)
    if answer.text and len(answer.top[0] if answer.top else ()) < 2:
        raise EndpointError(
            f"annotator.model={server.model}: answers without the log-probabilities of several "
            "tokens, which preferences are read off; name a model and server that give them"
        )
    preferred = preference(answer.top[0], draft.is_switched) if answer.top else None
    return replace(
        draft,
        status="invalid" if preferred is None else "ok",
        preference=preferred,
        raw=answer.text,
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
    )


def _merged(row: Annotation, draft: Annotation) -> Annotation:
    """The draft with a stored annotation's answer, which may have had the sides the other way."""
    preferred = row.preference
    if preferred is not None and row.is_switched is not draft.is_switched:
        preferred = 3 - preferred
    answered = ("status", "raw", "prompt_tokens", "completion_tokens")
    return replace(draft, preference=preferred, **{key: getattr(row, key) for key in answered})
