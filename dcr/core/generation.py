"""Greedy answers of a model on this machine: longest prompts first, as many as memory holds.

`passes` decode each batch.
"""

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from pydantic import FiniteFloat
from torch import Tensor
from transformers import SequenceBiasLogitsProcessor

from dcr.core import extending, machine, passes
from dcr.core.config import ConfigError, DataError
from dcr.core.config.evaluation import GenConfig
from dcr.core.models import Policy, structure
from dcr.core.prompts import ChatFormat, special_tokens
from dcr.core.sources import Example
from dcr.core.text import answer_in

log = logging.getLogger(__name__)

Row = TypeVar("Row")
Done = TypeVar("Done")
Encoded = tuple[Example, list[int]]  # a row and its prompt's token ids


@dataclass(frozen=True)
class Completion:
    """A model's answer to a prompt.

    `refusal_mass` is the caller's score of the first token's logits; None for an answer of a
    server, which is asked for those separately.
    """

    id: str
    prompt: str
    response: str
    tokens: int
    ended: bool  # by an end token, not by the token limit
    refusal_mass: FiniteFloat | None


@dataclass(frozen=True)
class OpeningBias:
    """A bias on the logits of `tokens` at the beginning of an answer, behind the tokens `lead`."""

    lead: tuple[int, ...]
    tokens: tuple[int, ...]
    bias: float

    @property
    def sequences(self) -> list[list[Any]]:
        """The value of `sequence_bias` in transformers' generation config."""
        return [[[*self.lead, token], self.bias] for token in self.tokens]


@runtime_checkable
class Decoding(Protocol):
    """A replacement of plain greedy decoding, which may read each prompt twice."""

    def read(self, policy: Policy, chat: ChatFormat, encoded: Sequence[Encoded]) -> list[Encoded]:
        """The prompts in their longest reading. Raises ConfigError if the model cannot read it."""
        ...

    def answered(
        self,
        policy: Policy,
        chat: ChatFormat,
        batch: Sequence[Encoded],
        max_new_tokens: int,
        score: Callable[[Tensor], Tensor],
    ) -> tuple[list[list[int]], Tensor]:
        """The new tokens and the scores of a batch, as `continued` gives them."""
        ...


def complete(
    policy: Policy,
    chat: ChatFormat,
    rows: Sequence[Example],
    settings: GenConfig,
    score: Callable[[Tensor], Tensor],
    bias: OpeningBias | None = None,
    decoding: Decoding | None = None,
    decided: Callable[[str], bool] | None = None,
    encode: Callable[[str], list[int]] | None = None,
) -> Iterator[list[Completion]]:
    """Greedy completions of every row, batch by batch; each ends once its text is `decided`.

    The longest prompts come first, so that running out of memory happens at once; the batch is then
    halved and starts again. `settings.batch_size` is the most at once; None takes as many as the
    free memory holds. `score` maps the decoded first-token logits [prompts, vocabulary] to
    [prompts]; they include `bias`, or come from another `decoding`, which takes no bias. `encode`
    gives the token ids that stand for a prompt, where they are not those of the chat.

    Raises DataError for a prompt longer than the model's context, and ConfigError if the model or
    its template does not allow the decoding, when it is called rather than with the first batch.
    """
    chat = settings.decoding(chat)
    waiting, size = ordered(policy, chat, rows, settings, decoding, encode)

    def answered(batch: Sequence[Encoded]) -> list[Completion]:
        if decoding:
            answers, masses = decoding.answered(policy, chat, batch, settings.most, score)
        else:
            prompts = [ids for _, ids in batch]
            answers, masses = continued(
                policy, chat, prompts, settings.most, score, bias=bias, decided=decided
            )
        return [
            completion(chat, row, answer, mass)
            for (row, _), answer, mass in zip(batch, answers, masses.tolist(), strict=True)
        ]

    return halving(waiting, size, "gen.batch_size", answered)


def ordered(
    policy: Policy,
    chat: ChatFormat,
    rows: Sequence[Example],
    settings: GenConfig,
    decoding: Decoding | None,
    encode: Callable[[str], list[int]] | None = None,
) -> tuple[list[Encoded], int]:
    """The rows in the order in which `complete` answers them, and the batch size.

    Raises DataError and ConfigError as that does.
    """
    chat.check(rows)
    encode = encode or chat.prompt_ids
    waiting = [(row, encode(row.prompt)) for row in rows]
    waiting.sort(key=lambda pair: (-len(pair[1]), pair[0].id))
    if not waiting:
        return [], 1
    read = decoding.read(policy, chat, waiting) if decoding else waiting
    check_context(policy, read, settings.most)
    longest = max(len(ids) for _, ids in read)
    size = settings.batch_size or batch_size(policy.model, longest, settings.most)
    if decoding and not settings.batch_size:
        size = max(1, size // 2)  # two readings keep two caches
    log.info("%d prompts, the longest of %d tokens: %d at once", len(waiting), longest, size)
    return waiting, size


def check_context(policy: Policy, encoded: Sequence[Encoded], new_tokens: int) -> None:
    """Raises DataError for a prompt that leaves no room in the context for so many new tokens."""
    context = structure.context_length(policy.model.config)
    for row, ids in encoded:
        if len(ids) + new_tokens > context:
            fewer = " or lower gen.max_new_tokens" if len(ids) < context else ""
            raise DataError(
                f"{row.source}: {row.id}: its {len(ids)} tokens and {new_tokens} new ones exceed "
                f"the model's context of {context}; shorten it{fewer}"
            )


def completion(chat: ChatFormat, row: Example, answer: Sequence[int], mass: float) -> Completion:
    """The record of an answer's token ids; tokens behind an end token do not count."""
    tokens = len(_unended(chat, answer))
    return Completion(row.id, row.prompt, text(chat, answer), tokens, tokens < len(answer), mass)


def _unended(chat: ChatFormat, answer: Sequence[int]) -> list[int]:
    """The tokens of an answer before its end token."""
    return list(itertools.takewhile(lambda token: token not in chat.stop, answer))


def text(chat: ChatFormat, answer: Sequence[int]) -> str:
    """The text of an answer's token ids up to its end token, without a thought before it.

    It is empty where a thought does not end.
    """
    said = _unended(chat, answer)
    words = str(chat.tokenizer.decode(said, skip_special_tokens=True))
    if chat.marks:  # which may be special tokens
        spelled = str(chat.tokenizer.decode(said, skip_special_tokens=False))
        if (behind := answer_in(spelled, chat.marks)) != spelled:
            words = behind
            for token in special_tokens(chat.tokenizer):
                words = words.replace(token, "")
    return words.strip()


# --- one batch ------------------------------------------------------------------------------------


def continued(
    policy: Policy,
    chat: ChatFormat,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    score: Callable[[Tensor], Tensor],
    streamer: Any = None,
    bias: OpeningBias | None = None,
    decided: Callable[[str], bool] | None = None,
) -> tuple[list[list[int]], Tensor]:
    """The greedy new tokens of each prompt, and `score` of its first logits.

    An answer ends with an end token, or with the first token after which its text is `decided`.
    """
    biased: Any = SequenceBiasLogitsProcessor(bias.sequences) if bias else None

    def is_over(answer: Sequence[int]) -> bool:
        return answer[-1] in chat.stop or (decided is not None and decided(text(chat, answer)))

    def changed(ids: Tensor, logits: Tensor) -> Tensor:
        scores = biased(ids, logits) if biased else logits
        return chat.processor(ids, scores) if chat.processor else scores

    def scored(logits: Tensor) -> Tensor:
        return finite(score(logits).float().cpu())

    return passes.current().continued(
        policy.model, prompts, max_new_tokens, changed, scored, is_over, streamer
    )


def finite(scores: Float[Tensor, "rows"]) -> Float[Tensor, "rows"]:
    """The scores, before any is kept. ConfigError where the model's numbers overflowed."""
    if not scores.isfinite().all():
        raise ConfigError(
            "precision: what the model computes is not finite; use precision=fp32, or a smaller "
            "steering.strength"
        )
    return scores


# --- the size of a batch --------------------------------------------------------------------------


def batch_size(model: Any, prompt_tokens: int, new_tokens: int) -> int:
    """The number of prompts of at most `prompt_tokens` to decode at once on the model's device."""
    return extending.part("batch_size")(model, prompt_tokens, new_tokens)


def halving(
    rows: Sequence[Row], size: int, setting: str, work: Callable[[Sequence[Row]], Done]
) -> Iterator[Done]:
    """Yields `work` of `size` rows at a time, and halves the size whenever memory runs out.

    A warning names the `setting` that gave the size.
    """
    while rows:
        try:
            done = work(rows[:size])
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not machine.is_out_of_memory(error):
                raise
            done = None
        if done is None:  # outside the clause, whose error would hold tensors of its frames
            torch.cuda.empty_cache()
            size = max(1, min(size, len(rows)) // 2)
            log.warning("out of memory: %s is now %d", setting, size)
            continue
        rows = rows[size:]
        yield done
