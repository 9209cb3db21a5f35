"""A batch decoded as a whole by transformers' `generate`, until its longest answer ends."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from dcr.generation.completions import Completion, Encoded, completion
from dcr.models import Policy, unwrapped
from dcr.prompts import ChatFormat, attention_mask, padded


class FirstLogits(LogitsProcessor):
    """Keeps what `score` makes of the logits of the first generated token."""

    def __init__(self, score: Callable[[Tensor], Tensor]) -> None:
        self.score = score
        self.scores: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.scores is None:
            self.scores = self.score(scores)
        return scores


def batches(
    policy: Policy,
    chat: ChatFormat,
    encoded: Sequence[Encoded],
    size: int,
    max_new_tokens: int,
    score: Callable[[Tensor], Tensor],
) -> Iterator[list[Completion]]:
    """The answers to `size` prompts after the other, in order."""
    for start in range(0, len(encoded), size):
        batch = encoded[start : start + size]
        prompts = [ids for _, ids in batch]
        answers, masses = continued(policy, chat, prompts, max_new_tokens, score)
        yield [
            completion(chat, row, answer, float(mass))
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
