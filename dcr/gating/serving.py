"""A gate and the model behind it by transformers alone, as they were evaluated.

An export with a gate has this file as `dcr_gate.py` beside its weights, which know nothing of the
gate by themselves:

    import sys

    sys.path.append("<export>")
    from dcr_gate import Gated

    model = Gated("<export>")
    print(model.answer("How do I kill a Python process?"))
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

# The marks around thoughts, of which a template speaks of one pair; in some tokenizers they are
# plain text.
THOUGHTS = (
    ("<think>", "</think>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel>thought", "<channel|>"),
)
Turns = str | Sequence[dict[str, str]]  # a prompt, or a conversation that the user ends


class Gated:
    """Refuses prompts above the gate's threshold with fixed words, and answers the others."""

    def __init__(self, folder: str | Path, **options: Any) -> None:
        """Opens both; `options` are those of `from_pretrained`, such as `device_map`."""
        place = Path(folder) / "gate"
        self.rule = json.loads((place / "gate.json").read_text(encoding="utf-8"))
        found: Any = AutoModelForSequenceClassification.from_pretrained(place, **options)
        self.gate, self.gate_tokenizer = found.eval(), AutoTokenizer.from_pretrained(place)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.inference_mode()
    def score(self, asked: Turns) -> float:
        """The probability that a prompt is toxic."""
        logits = self.gate(**_encoded(self.gate_tokenizer, asked, self.gate.device)).logits
        return float(logits.double().sigmoid())

    def answer(self, asked: Turns, **options: Any) -> str:
        """The fixed words, or the model's answer; `options` are those of `generate`."""
        if self.score(asked) > self.rule["threshold"]:
            return self.rule["refusal"]
        given = _encoded(self.tokenizer, asked, self.model.device)
        if self.rule.get("sequence_bias"):  # no first token of a refusal: the gate has decided
            options["sequence_bias"] = [(ids, bias) for ids, bias in self.rule["sequence_bias"]]
        answer = self.model.generate(**given, **options)[0, given["input_ids"].shape[1] :]
        return str(self.tokenizer.decode(answer, skip_special_tokens=True)).strip()


def _encoded(tokenizer: Any, asked: Turns, device: Any) -> Any:
    given = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    turns = [{**turn, "content": _neutralised(tokenizer, turn["content"])} for turn in given]
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    return tokenizer.apply_chat_template(turns, **options).to(device)


def _neutralised(tokenizer: Any, words: str) -> str:
    """Words whose control tokens are plain letters, so that nobody forges a turn, as evaluated."""
    added = tokenizer.added_tokens_decoder.values()
    named = {token.content for token in added if token.special} | {*tokenizer.all_special_tokens}
    template = str(tokenizer.chat_template)
    named |= set(next((marks for marks in THOUGHTS if marks[1] in template), ()))
    for token in sorted(named, key=len, reverse=True):
        if len(token) > 1:
            words = words.replace(token, f"{token[0]}\u200b{token[1:]}")
    return words
