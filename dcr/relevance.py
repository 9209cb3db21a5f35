"""Whether answers are about their prompts: tasks=[over_refusal,safety,dcr.relevance:Relevance].

An answer y is about its prompt x as far as it makes x likelier, log p(x | y) - log p(x) in nats
(pointwise mutual information), to a small model that reads y and behind it x as a question. It
counts as relevant if it does so more for its own prompt than for each of some other prompts of the
set. This tells answers to something else and empty talk from answers, not good ones from bad ones:
an answer that only repeats its prompt is relevant.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float
from pydantic import FiniteFloat
from torch import Tensor

from dcr import builtin, decoding, inference
from dcr.core import learning, machine, models, passes, storage
from dcr.core.config import EMBEDDED_MODEL, ConfigError, ModelConfig, Precision
from dcr.core.config.evaluation import EvalConfig
from dcr.core.evaluation import PromptSet, kept
from dcr.core.evaluation.protocols import Task, Work
from dcr.core.generation import Completion
from dcr.core.models import Policy, structure
from dcr.core.prompts import IGNORED
from dcr.core.runs import Run
from dcr.core.sources import Example
from dcr.resolving import cut_short

MODEL = EMBEDDED_MODEL  # one for all, so that columns compare; in fp32, so that machines do
BETWEEN = "\n\nQuestion:"  # an answer and its prompt
ANSWER, PROMPT = 128, 64  # tokens that are read


@dataclass(frozen=True)
class Score:
    """By how many nats an answer makes its prompt likelier.

    `others` counts the other prompts that gain at least as much from it.
    """

    id: str
    prompt: str
    nats: FiniteFloat
    others: int


@dataclass
class Relevance(Task):
    """The share of answers that are about their prompts, by set and by kind of prompt."""

    closed = True

    others: int = 10  # prompts that an answer is tried on besides its own

    def check(self, settings: EvalConfig, run: Run) -> None:
        if self.others < 1:
            raise ConfigError(f"own.Relevance.others={self.others}: give prompts, 1 or more")
        for fault in cut_short(settings, "tasks=[dcr.relevance:Relevance]"):
            raise ConfigError(fault)
        if MODEL == EMBEDDED_MODEL:
            builtin.embedded_folder()

    def measure(self, work: Work) -> dict[str, Any]:
        """`relevant`, a share with its 95% Wilson interval, and `nats`, the mean, of each set and
        kind. A set of one prompt has none to compare with and is left out.
        """
        found: dict[str, list[Score]] = {}
        opened: list[Policy] = []
        for asked in work.asked:
            scores = self._scores(work, asked, opened)
            found.setdefault(asked.name, []).extend(scores)
            found.setdefault(asked.kind.value, []).extend(scores)
        measured = {}
        for name, scores in found.items():
            if scores:
                relevant = inference.wilson(sum(not s.others for s in scores), len(scores))
                nats = fmean(score.nats for score in scores)
                measured[name] = {"relevant": list(astuple(relevant)), "nats": nats}
        return measured

    def _scores(self, work: Work, asked: PromptSet, opened: list[Policy]) -> list[Score]:
        """Those of one set, kept beside its answers; the model is opened where some are missing."""
        answers = {answer.id: answer for answer in work.answers[asked.name]}
        prompts = sorted({answer.prompt for answer in answers.values()})
        if len(prompts) < 2:
            return []

        def ask(rows: list[Example]) -> Iterator[list[Score]]:
            if not opened:
                opened.append(models.open_policy(ModelConfig(name=MODEL), Precision.fp32))
                machine.to_gpu(opened[0].model, work.settings.trainer.accelerator)
            return self.read(opened[0], [answers[row.id] for row in rows], prompts)

        texts = [[answer.prompt, answer.response] for answer in answers.values()]
        made = storage.fingerprint([MODEL, BETWEEN, ANSWER, PROMPT, self.others, sorted(texts)])
        answered = PromptSet(asked.name, asked.kind, [r for r in asked.rows if r.id in answers])
        place, progress = work.folder / f"relevance-{made}", work.settings.trainer.progress
        return kept([answered], ask, place, Score, "relevance", progress)[asked.name]

    def read(
        self, policy: Policy, answers: Sequence[Completion], prompts: Sequence[str]
    ) -> Iterator[list[Score]]:
        """The score of each answer against other `prompts`, drawn by its own."""
        alone: dict[str, float] = {}
        with decoding.caching(policy.model):  # its products without gradient are faster
            for answer in answers:
                rest = [prompt for prompt in prompts if prompt != answer.prompt]
                drawn = random.Random(answer.prompt).sample(rest, min(self.others, len(rest)))
                tried = [answer.prompt, *drawn]
                if new := [prompt for prompt in tried if prompt not in alone]:
                    alone |= zip(new, log_p(policy, "", new).tolist(), strict=True)
                before = torch.tensor([alone[prompt] for prompt in tried])
                own, *others = (log_p(policy, answer.response, tried) - before).tolist()
                yield [Score(answer.id, answer.prompt, own, sum(other >= own for other in others))]


@torch.no_grad()
def log_p(policy: Policy, answer: str, prompts: Sequence[str]) -> Float[Tensor, "prompts"]:
    """log p of each prompt, in nats, behind one answer; an empty one is none."""

    def ids(text: str) -> list[int]:
        return policy.tokenizer.encode(text, add_special_tokens=False)

    begun = policy.tokenizer.bos_token_id
    before = [*([] if begun is None else [begun]), *ids(answer)[:ANSWER], *ids(BETWEEN)]
    asked = [ids(f" {prompt}")[:PROMPT] for prompt in prompts]
    rows = [before + prompt for prompt in asked]
    targets = [[IGNORED] * (len(before) - 1) + prompt + [IGNORED] for prompt in asked]
    device = structure.unwrapped(policy.model).device
    nll = learning.current().nll(
        policy.model,
        passes.padded(rows, 0).to(device),
        passes.attention_mask(rows).to(device),
        passes.padded(targets, IGNORED).to(device),
    )
    by_prompt = nll.each.float().cpu().split([len(prompt) for prompt in asked])
    return -torch.stack([each.sum() for each in by_prompt])
