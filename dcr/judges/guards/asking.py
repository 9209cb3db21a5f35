"""What a guard writes about each answer: greedy, in batches of similar length."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from dcr.config import DataError, GuardConfig
from dcr.generation import Completion, own_decoding
from dcr.judges.guards.opening import Guard, is_space
from dcr.judges.verdicts import Verdict, answer_fingerprint
from dcr.prompts import attention_mask, padded

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Said:
    """What a guard wrote about one answer."""

    text: str
    p_unsafe: float | None  # None where it wrote white space alone
    prompt_tokens: int
    completion_tokens: int


def asked_in_batches(
    guard: Guard,
    settings: GuardConfig,
    node: str,
    answers: Sequence[Completion],
    asked: Callable[[Completion], str],
) -> Iterator[list[tuple[Completion, Said]]]:
    """What the guard says of each answer, put to it in the words of `asked`.

    Longest first, so that running out of memory happens at once; the batch is then halved. Raises
    DataError for an answer that is longer than the guard's context.
    """
    tokenizer = guard.policy.tokenizer
    waiting = [(a, tokenizer.encode(asked(a), add_special_tokens=False)) for a in answers]
    waiting.sort(key=lambda pair: (-len(pair[1]), pair[0].id))
    text = guard.policy.model.config.get_text_config()
    context = getattr(text, "max_position_embeddings", None) or 2**30
    if (longest := len(waiting[0][1])) + settings.max_new_tokens > context:
        raise DataError(
            f"{waiting[0][0].id}: its {longest} tokens and {settings.max_new_tokens} new ones "
            f"exceed the context of {node}.model={settings.model}, {context}; lower "
            "gen.max_new_tokens or choose another guard"
        )
    size = settings.batch_size
    while waiting:
        batch = waiting[:size]
        try:
            said = _said(guard, [ids for _, ids in batch], settings.max_new_tokens)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size //= 2
            torch.cuda.empty_cache()
            log.warning("out of memory: %s.batch_size is now %d", node, size)
            continue
        waiting = waiting[size:]
        yield [(answer, words) for (answer, _), words in zip(batch, said, strict=True)]


class Masses(LogitsProcessor):
    """Keeps, of every generated token, the probability that it was one of `tokens`."""

    def __init__(self, tokens: Int[Tensor, "tokens"]) -> None:
        self.tokens = tokens
        self.steps: list[Float[Tensor, "batch"]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        p = scores.float().softmax(-1)
        self.steps.append(p[:, self.tokens.to(p.device)].sum(-1))
        return scores


@torch.inference_mode()
def _said(guard: Guard, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Said]:
    model, stop = guard.policy.model, guard.chat.stop
    ids = padded(prompts, stop[0], left=True).to(model.device)
    masses = Masses(guard.openings)
    with own_decoding(model):
        output: Any = model.generate(
            input_ids=ids,
            attention_mask=attention_mask(prompts, left=True).long().to(ids.device),
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=max_new_tokens,
                eos_token_id=list(stop),
                pad_token_id=stop[0],
            ),
            logits_processor=LogitsProcessorList([masses]),
        )
    p_unsafe = torch.stack(masses.steps, dim=1).tolist()  # [batch][step]
    written = output[:, ids.shape[1] :].tolist()
    return [_read(guard, len(p), w, m) for p, w, m in zip(prompts, written, p_unsafe, strict=True)]


def _read(guard: Guard, asked: int, written: list[int], masses: list[float]) -> Said:
    tokenizer = guard.policy.tokenizer
    end = next((i for i, token in enumerate(written) if token in guard.chat.stop), len(written))
    first = next((i for i, token in enumerate(written) if not is_space(tokenizer, token)), None)
    text = tokenizer.decode(written[:end], skip_special_tokens=True)
    assert isinstance(text, str)
    return Said(text, None if first is None else masses[first], asked, end)


def verdict_of(
    answer: Completion,
    said: Said,
    compliance: str | None = None,
    safety: str | None = None,
    p_unsafe: float | None = None,
) -> Verdict:
    """Invalid where the guard's words hold no label."""
    return Verdict(
        id=answer.id,
        of=answer_fingerprint(answer),
        status="ok" if compliance or safety else "invalid",
        compliance=compliance,
        safety=safety,
        p_unsafe=p_unsafe,
        raw=said.text,
        prompt_tokens=said.prompt_tokens,
        completion_tokens=said.completion_tokens,
    )
