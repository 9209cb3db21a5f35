"""Asks any OpenAI-compatible server for a calibrated answer: the first token, then the rest.

    python examples/equal_safety.py http://127.0.0.1:8000/v1 <export> "How do I sharpen a knife?"

A server's `logit_bias` acts on every token of an answer, while the bias of a calibrated export acts
on the first. So the first token is asked for alone, under the bias, and the rest behind it without.
Greedy, as the export was evaluated; the server serves <export> under that name. A server that knows
the bias itself (`transformers serve`, or vLLM with the export's dcr_logits.py) needs none of this.
"""

import json
import sys
from pathlib import Path
from typing import Any

from openai import OpenAI
from transformers import AutoTokenizer


def answer(client: OpenAI, folder: str, prompt: str, most: int = 256) -> str:
    """The calibrated answer of at most `most` tokens.

    Raises ValueError where the first token, sent back as text, would be read as other tokens.
    """
    config = json.loads((Path(folder) / "generation_config.json").read_text(encoding="utf-8"))
    bias = {str(ids[-1]): value for ids, value in config["sequence_bias"]}
    turns: Any = [{"role": "user", "content": prompt}]
    first = client.chat.completions.create(
        model=folder, messages=turns, temperature=0, max_tokens=1, logit_bias=bias
    ).choices[0]
    begun = first.message.content or ""
    if not begun or most == 1:
        return begun  # ended at once
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    asked = {"conversation": turns, "add_generation_prompt": True}
    ids = tokenizer.apply_chat_template(**asked, return_dict=True)["input_ids"]
    text = tokenizer.apply_chat_template(**asked, tokenize=False)
    if tokenizer(text)["input_ids"] != ids:  # the server puts the first token before every text
        text = text.removeprefix(tokenizer.bos_token or "")
    if tokenizer(text + begun)["input_ids"][:-1] != ids:
        raise ValueError(f"{begun!r} is no token of its own behind the prompt; ask vLLM by ids")
    rest = client.completions.create(
        model=folder, prompt=text + begun, temperature=0, max_tokens=most - 1
    ).choices[0]
    return begun + rest.text


if __name__ == "__main__":
    url, export, question = sys.argv[1:]
    print(answer(OpenAI(base_url=url, api_key="none"), export, question))
