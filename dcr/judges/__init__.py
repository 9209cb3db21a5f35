"""Judges: who says whether a response refuses, answers or does harm. Here are their settings.

`served` and `guards` are the judges themselves, whose names stand in `dcr.extensions`; `judging`
asks them for missing verdicts; `verdicts` reads their prompts and counts their verdicts; `section`
shows these on the page; `pairwise` compares two answers.
"""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from dcr.core.config import Precision
from dcr.endpoints import ServerConfig


@dataclass
class LLMJudgeConfig(ServerConfig):
    """XSTest's three labels from any chat model (the paper: GPT-4o and GPT-5.1)."""

    model: str = "gpt-4o-2024-11-20"
    parameters: dict[str, Any] = field(default_factory=lambda: {"temperature": 0, "max_tokens": 16})
    prompt: str | None = None  # a file with wording of your own; null: dcr/judges/xstest.txt


@dataclass
class ModerationConfig(ServerConfig):
    """OpenAI Moderation of the response alone, as in STL's script."""

    model: str = "omni-moderation-latest"


@dataclass
class GuardConfig:
    """A guard model run here: a hub id or a local folder."""

    model: str = MISSING
    revision: str | None = None
    precision: Precision = Precision.auto  # of the guard alone
    batch_size: int = 8


@dataclass
class LlamaGuardConfig(GuardConfig):
    model: str = "meta-llama/Llama-Guard-3-8B"


@dataclass
class WildGuardConfig(GuardConfig):
    model: str = "allenai/wildguard"
    prompt: str | None = None  # a file; null: dcr/judges/wildguard.txt, in our own words


@dataclass
class AnnotatorConfig(ServerConfig):
    """The annotator that compares two answers by one token's log-probabilities (AlpacaEval 2)."""

    model: str = "gpt-4o-mini-2024-07-18"
    parameters: dict[str, Any] = field(
        default_factory=lambda: {
            "temperature": 0,
            "max_tokens": 1,
            "logprobs": True,
            "top_logprobs": 5,
        }
    )
    prompt: str | None = None  # null: dcr/judges/pairwise.txt
