"""Contrastive decoding: its settings, and what they contradict; `decoding` decodes."""

from collections.abc import Iterator
from dataclasses import dataclass

from dcr.core.config.evaluation import EvalConfig, GenConfig
from dcr.resolving import cut_short, decoding_alone, not_negative, positive, ranged


@dataclass
class ContrastConfig(GenConfig):
    # Self-CD (OverKill, ACL 2024): the weight at which to subtract what a system prompt that
    # stresses safety adds to the logits. The released code's is 1.5; null decodes plainly.
    self_cd: float | None = ranged(None, not_negative, "give a weight of 0 or more, or null")
    # AdaCD (arXiv 2604.17132): the ratio at which to add or subtract, token by token, what a system
    # prompt that asks for a refusal adds to the logits. The released code's is 4.5.
    adacd: float | None = ranged(None, positive, "give a ratio above 0, or null")

    @property
    def contrast(self) -> dict[str, float]:
        named = {"self_cd": self.self_cd, "adacd": self.adacd}
        return {name: value for name, value in named.items() if value is not None}


def relations(settings: EvalConfig) -> Iterator[str]:
    """The contradictions between the two ways, and with other settings."""
    contrasts = [f"gen.{name}={value}" for name, value in settings.gen.contrast.items()]
    yield from cut_short(settings, *contrasts)
    if len(contrasts) > 1:
        yield f"{' '.join(contrasts)}: two ways to decode; give one"
    for contrast in contrasts:
        yield from decoding_alone(settings, contrast, "a contrast is a way to decode answers")
