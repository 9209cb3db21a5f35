"""Batched greedy completions: sorted by length, stopped on every end token, stored as they come."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from dcr.config import DataError, GenConfig
from dcr.models import Policy, unwrapped
from dcr.prompts import ChatFormat, attention_mask, padded
from dcr.sources import Example

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Completion:
    """What a model answered. `score` is whatever the caller reads off the first-token logits."""

    id: str
    prompt: str
    response: str
    tokens: int
    ended: bool  # by an end token, not by the token limit
    refusal_mass: float


class FirstLogits(LogitsProcessor):
    """Keeps what `score` makes of the logits of the first generated token."""

    def __init__(self, score: Callable[[Tensor], Tensor]) -> None:
        self.score = score
        self.scores: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.scores is None:
            self.scores = self.score(scores)
        return scores


def complete(
    policy: Policy,
    chat: ChatFormat,
    rows: Sequence[Example],
    settings: GenConfig,
    score: Callable[[Tensor], Tensor],
) -> Iterator[list[Completion]]:
    """Greedy completions in batches of similar prompt length, longest first.

    Longest first, so that running out of memory happens at once; the batch is then halved and
    the run goes on. `score` maps first-token logits [prompts, vocabulary] to [prompts].
    Raises DataError for a prompt longer than the model's context.
    """
    encoded = [(row, chat.prompt_ids(row.prompt)) for row in rows]
    _check_context(policy, encoded, settings.max_new_tokens)
    encoded.sort(key=lambda pair: (-len(pair[1]), pair[0].id))
    size = settings.batch_size
    while encoded:
        batch, rest = encoded[:size], encoded[size:]
        try:
            done = _complete_batch(policy, chat, batch, settings.max_new_tokens, score)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size = max(1, size // 2)
            torch.cuda.empty_cache()
            log.warning("out of memory: gen.batch_size is now %d", size)
            continue
        encoded = rest
        yield done


def _complete_batch(
    policy: Policy,
    chat: ChatFormat,
    batch: Sequence[tuple[Example, list[int]]],
    max_new_tokens: int,
    score: Callable[[Tensor], Tensor],
) -> list[Completion]:
    prompts = [ids for _, ids in batch]
    answers, masses = continued(policy, chat, prompts, max_new_tokens, score)
    return [
        _completion(chat, row, answer, float(mass))
        for (row, _), answer, mass in zip(batch, answers, masses, strict=True)
    ]


@torch.inference_mode()
def continued(
    policy: Policy,
    chat: ChatFormat,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    score: Callable[[Tensor], Tensor],
    streamer: Any = None,
) -> tuple[list[list[int]], Tensor]:
    """Greedy new tokens of each prompt (padded behind its end), and `score` of its first logits."""
    ids = padded(prompts, chat.stop[0], left=True).to(policy.model.device)
    first = FirstLogits(score)
    with own_decoding(policy.model):
        output: Any = policy.model.generate(
            input_ids=ids,
            attention_mask=attention_mask(prompts, left=True).long().to(ids.device),
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=max_new_tokens,
                eos_token_id=list(chat.stop),
                pad_token_id=chat.stop[0],
            ),
            logits_processor=LogitsProcessorList([first]),
            streamer=streamer,
        )
    assert first.scores is not None
    return output[:, ids.shape[1] :].tolist(), first.scores


@contextmanager
def own_decoding(model: Any) -> Iterator[None]:
    """While open, the checkpoint's generation settings are set aside.

    What a call leaves unset transformers takes from them, such as the repetition penalty of
    Qwen2.5-Instruct, and decoding would be greedy in name only.
    """
    owner = unwrapped(model)
    kept, owner.generation_config = owner.generation_config, GenerationConfig()
    try:
        yield
    finally:
        owner.generation_config = kept


def _completion(chat: ChatFormat, row: Example, answer: list[int], mass: float) -> Completion:
    end = next((i for i, token in enumerate(answer) if token in chat.stop), len(answer))
    text = chat.tokenizer.decode(answer[:end], skip_special_tokens=True)
    assert isinstance(text, str)
    return Completion(row.id, row.prompt, text.strip(), end, end < len(answer), mass)


def _check_context(
    policy: Policy, encoded: Sequence[tuple[Example, list[int]]], new_tokens: int
) -> None:
    text = policy.model.config.get_text_config()
    context = getattr(text, "max_position_embeddings", None) or 2**30
    for row, ids in encoded:
        if len(ids) + new_tokens > context:
            raise DataError(
                f"{row.source}: {row.id}: its {len(ids)} tokens and {new_tokens} new ones exceed "
                f"the model's context of {context}; shorten it or lower gen.max_new_tokens"
            )


def stored(path: Path) -> dict[str, Completion]:
    """Completions already in a file, by id; a last line torn by a kill is left out."""
    if not path.is_file():
        return {}
    found: dict[str, Completion] = {}
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:  # not JSON, or torn within a character
            continue
        found[row["id"]] = Completion(**row)
    return found


def store(path: Path, completions: Sequence[Completion]) -> None:
    """Append completions, one JSON line each, flushed before returning."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.is_file() and path.stat().st_size > 0 and not _ends_in_newline(path)
    with path.open("a", encoding="utf-8") as file:
        if torn:
            file.write("\n")
        for completion in completions:
            file.write(json.dumps(asdict(completion), ensure_ascii=False) + "\n")
        file.flush()


def _ends_in_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"
