"""The prompts that observe and those that are stepped on, as token ids."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from dcr.config import ConfigError, Kind
from dcr.prompts import ChatFormat
from dcr.sources import Example


@dataclass(frozen=True)
class Subjects:
    """Observers first, by kind, then the trained prompts; `of` has the observers' kinds alone.

    `target` is the token that every trained prompt is answered with, `left_out` the ids of pairs
    that begin with another one.
    """

    sequences: tuple[tuple[int, ...], ...]
    ids: tuple[str, ...]
    of: tuple[str, ...]
    target: int
    left_out: tuple[str, ...]

    @property
    def observers(self) -> int:
        return len(self.of)

    @property
    def trained(self) -> range:
        """Where the trained prompts stand."""
        return range(self.observers, len(self.ids))

    def others(self) -> Bool[np.ndarray, "observers trained"]:
        """Whether the observer is another prompt than the trained one, whatever the two ids."""
        return self._differ()[: self.observers, self.observers :]

    def couples(self) -> Bool[np.ndarray, "observers observers"]:
        """Every pair of two different observers once."""
        return np.triu(self._differ()[: self.observers, : self.observers], k=1)

    def _differ(self) -> Bool[np.ndarray, "prompts prompts"]:
        number = {sequence: i for i, sequence in enumerate(self.sequences)}
        places = np.array([number[sequence] for sequence in self.sequences])
        return places[:, None] != places


def subjects(
    chat: ChatFormat, rows: Mapping[Kind, Sequence[Example]], trained: Sequence[Example]
) -> Subjects:
    """All prompts in the model's chat template.

    Steps are compared by what they do to the log-probability of one token, so of the pairs only
    those stay whose response begins with the token that most of them begin with (of equally many,
    the first). Raises ConfigError where there is no observer, no pair or no response.
    """
    flat = [(kind.value, row) for kind, part in rows.items() for row in part]
    if not flat or not trained:
        missing = "trained pair" if flat else "prompt to observe"
        raise ConfigError(f"claims: there is no {missing}; give at least one")
    begins, target = _begins(chat, trained)
    kept = [row for row, token in zip(trained, begins, strict=True) if token == target]
    every = [*(row for _, row in flat), *kept]
    return Subjects(
        sequences=tuple(tuple(chat.prompt_ids(row.prompt)) for row in every),
        ids=tuple(row.id for row in every),
        of=tuple(kind for kind, _ in flat),
        target=target,
        left_out=tuple(r.id for r, token in zip(trained, begins, strict=True) if token != target),
    )


def alike(chat: ChatFormat, pairs: Sequence[Example]) -> list[Example]:
    """The pairs, in their order, that `subjects` keeps. ConfigError as `first_token`."""
    if not pairs:
        return []
    begins, target = _begins(chat, pairs)
    return [row for row, token in zip(pairs, begins, strict=True) if token == target]


def _begins(chat: ChatFormat, pairs: Sequence[Example]) -> tuple[list[int], int]:
    """First tokens, and the most common of them (of equally many, the first)."""
    begins = [first_token(chat, row) for row in pairs]
    return begins, Counter(begins).most_common(1)[0][0]


def first_token(chat: ChatFormat, row: Example) -> int:
    """The token that the row's response begins with behind its prompt.

    Raises ConfigError where the row has no response.
    """
    if not (row.response or "").strip():
        raise ConfigError(
            f"claims: {row.source}: {row.id} has no response; give pairs of a prompt and a refusal"
        )
    room = len(chat.prompt_ids(row.prompt)) + 1
    ids, _ = chat.pair(row.prompt, row.response or "", room)
    return ids[-1]
