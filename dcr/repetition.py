"""`gen.repetition_penalty`: tokens that an answer holds already become less likely in it.

CTRL's penalty (arXiv 1909.05858, Section 4.1) on the tokens of the answer alone, so that the
prompt's words, the refusal mass of its first token and a bias there stay as they are. A server
counts the prompt's tokens as well under this name.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dcr.core.config import ConfigError
from dcr.core.config.evaluation import EvalConfig, GenConfig
from dcr.core.evaluation.protocols import Change
from dcr.resolving import decoding_alone, ranged

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from dcr.core.prompts import ChatFormat


def at_least_one(value: float) -> bool:
    return value >= 1


@dataclass
class RepetitionConfig(GenConfig):
    # Divides the positive logits of tokens that the answer holds, and multiplies the negative ones
    # (CTRL; the paper's is 1.2). 1 decodes plainly.
    repetition_penalty: float = ranged(1.0, at_least_one, "give 1 or more")

    def decoding(self, chat: "ChatFormat") -> "ChatFormat":
        """Raises ConfigError for a template whose answers begin nowhere, see `penalised`."""
        chat = super().decoding(chat)
        return chat if self.repetition_penalty == 1 else penalised(chat, self.repetition_penalty)


def asked_for(settings: EvalConfig) -> float | None:
    """The penalty, or None where answers are decoded plainly."""
    value = settings.gen.repetition_penalty if isinstance(settings.gen, RepetitionConfig) else 1
    return None if value == 1 else value


def relations(settings: EvalConfig) -> Iterator[str]:
    """The contradictions of the penalty with other settings."""
    if (penalty := asked_for(settings)) is None:
        return
    named = f"gen.repetition_penalty={penalty}"
    if settings.endpoint is not None:
        yield (
            f"{named} endpoint={settings.endpoint}: a server has a penalty of its own; leave it "
            f"out and give 'endpoint_parameters={{repetition_penalty: {penalty}}}'"
        )
    for name, value in settings.gen.contrast.items():
        yield f"{named} gen.{name}={value}: two ways to decode; give one"
    if settings.gen.thinking is not None:
        yield f"{named} gen.thinking={settings.gen.thinking}: would reach into thoughts; give one"
    yield from decoding_alone(settings, named, "it acts while answers are decoded")


@dataclass(frozen=True)
class Penalty:
    """The logits of the next token, with those of tokens behind the last `lead` made smaller."""

    lead: tuple[int, ...]  # the end of a prompt, see `ChatFormat.lead`
    penalty: float

    def __call__(
        self, ids: "Int[Tensor, 'rows length']", logits: "Float[Tensor, 'rows vocabulary']"
    ) -> "Float[Tensor, 'rows vocabulary']":
        import torch

        length, lead = ids.shape[1], torch.tensor(self.lead, device=ids.device)
        places = torch.arange(length, device=ids.device)
        found = (ids.unfold(1, len(lead), 1) == lead).all(2)  # whether a lead begins here
        start = (found * (places[: found.shape[1]] + len(lead))).amax(1, keepdim=True)
        said = torch.zeros_like(logits, dtype=torch.bool)
        rows, behind = torch.where(places >= start)
        said[rows, ids[rows, behind]] = True
        less = torch.where(logits > 0, logits / self.penalty, logits * self.penalty)
        return torch.where(said, less, logits)


class Penalised(Change):
    """Answers decoded under the penalty."""

    def recorded(self, settings: EvalConfig) -> dict[str, Any]:
        penalty = asked_for(settings)
        return {} if penalty is None else {"repetition_penalty": penalty}

    def chat(self, subject: Any, chat: "ChatFormat") -> "ChatFormat":
        return subject.settings.gen.decoding(chat)


def penalised(chat: "ChatFormat", penalty: float) -> "ChatFormat":
    """A chat format whose answers are decoded under the penalty.

    Raises ConfigError for a template without a token between a user's words and the answer.
    """
    if not (lead := chat.lead()):
        raise ConfigError(
            f"gen.repetition_penalty={penalty}: no token of the chat template stands between the "
            "user's words and the answer, so its beginning cannot be found; name another "
            "model.template"
        )
    return replace(chat, processor=Penalty(tuple(lead), penalty))
