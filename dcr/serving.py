"""The bias of a calibrated export in vLLM, at the first token of an answer, as it was evaluated.

An export has this file as `dcr_logits.py` beside its weights:

    PYTHONPATH=<export> vllm serve <export> --logits-processors dcr_logits:Calibrated

It stands alone, reads the bias from `generation_config.json` beside it, and adds it wherever the
tokens so far end with those before an answer, which is where transformers' `generate` adds it. Both
of vLLM's interfaces are served, that of its older model runner and that of the newer one.
"""

import json
from pathlib import Path
from typing import Any

try:
    from vllm.v1.sample.logits_processor import (  # pyright: ignore[reportMissingImports]
        LogitsProcessor as Older,
    )
except ImportError:  # read without vLLM, as by tests
    Older: Any = type("Older", (), {})
try:
    from vllm.v1.worker.gpu.sample.logits_processor import (  # pyright: ignore[reportMissingImports]
        LogitsProcessor as Newer,
    )
except ImportError:  # a vLLM before this interface
    Newer: Any = type("Newer", (), {})


def written(folder: Path) -> tuple[list[int], list[int], float]:
    """The tokens before an answer, those that refusals begin with, and the bias on these.

    Raises ValueError if the folder's generation config has none.
    """
    config = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    sequences = config.get("sequence_bias") or []
    if not sequences:
        raise ValueError(f"{folder}: its generation_config.json has no sequence_bias")
    return sequences[0][0][:-1], [ids[-1] for ids, _ in sequences], sequences[0][1]


class Calibrated(Newer, Older):
    """Adds the bias to the rows of a batch whose next token is the first of an answer."""

    def __init__(self, vllm_config: Any, *given: Any) -> None:
        # the older interface gives device and pinning, the newer one the state of all requests
        self.states: Any = given[-1]
        self.lead, self.tokens, self.bias = written(Path(__file__).parent)
        self.rows: dict[int, tuple[list[int], list[int]]] = {}  # prompt and answer of each row

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follows the rows of the batch, whose answers' lists vLLM itself appends to."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self.rows.pop(row, None)
        for row, _, prompt, answer in batch_update.added:
            self.rows[row] = (list(prompt or [])[-len(self.lead) :], answer)
        for one, other, direction in batch_update.moved:
            before, after = self.rows.pop(one, None), self.rows.pop(other, None)
            if before is not None:
                self.rows[other] = before
            if after is not None and direction.name == "SWAP":
                self.rows[one] = after

    def apply(self, logits: Any, ctx: Any = None) -> Any:
        """The logits with the bias, [rows, vocabulary], changed in place."""
        if ctx is None:
            begun = [row for row, (prompt, answer) in self.rows.items() if self._at(prompt, answer)]
            for row in begun:
                logits[row, self.tokens] += self.bias
            return logits
        # behind the token at `pos`, which for a draft stands in the step's own tokens alone
        ids, slots = self.states.all_token_ids.gpu, ctx.expanded_idx_mapping.long()
        here = ctx.pos.long()
        begins = (here + 1 >= len(self.lead)) & (ctx.input_ids == self.lead[-1])
        for back, token in enumerate(reversed(self.lead[:-1]), start=1):
            begins &= ids[slots, (here - back).clamp(min=0)] == token
        logits[:, self.tokens] += self.bias * begins[:, None]
        return logits

    def _at(self, prompt: list[int], answer: list[int]) -> bool:
        """Whether the tokens so far end with those before an answer."""
        return [*prompt, *answer[-len(self.lead) :]][-len(self.lead) :] == self.lead
