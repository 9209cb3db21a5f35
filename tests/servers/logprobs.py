"""A chat server over a local model folder that gives true log-probabilities.

    python -m tests.servers.logprobs FOLDER --port 0

prints its base URL and serves until it is ended. Greedy decoding in fp32 on the CPU; the `k` of
`top_logprobs` is free, where OpenAI's ends at 20. Parameters it does not know are refused as
OpenAI refuses them.
"""

import argparse
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.servers.loopback import Answer, Request, answering, as_json
from tests.servers.scripted import rejected

KNOWN = {
    *("model", "messages", "temperature", "seed", "n", "stream"),
    *("max_tokens", "max_completion_tokens", "logprobs", "top_logprobs"),
}
DEFAULT_TOKENS = 16


@contextmanager
def logprobs(folder: Path | str) -> Iterator[str]:
    """The model in `folder` in threads of this process; yields the base URL."""
    with answering(responder(folder)) as url:
        yield url


def responder(folder: Path | str) -> Callable[[Request], Answer]:
    """A function that answers requests from the model in `folder`, one at a time."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    lock = threading.Lock()

    def respond(request: Request) -> Answer:
        if not request.path.endswith("/chat/completions"):
            return rejected(404, f"no such path: {request.path}")
        asked = request.body
        wrong = _refused(asked)
        if wrong is not None:
            return wrong
        with lock, torch.inference_mode():
            return as_json(_completion(model, tokenizer, asked))

    return respond


def _refused(asked: dict[str, Any]) -> Answer | None:
    for name in asked.keys() - KNOWN:
        message = f"Unsupported parameter: '{name}' is not supported with this model."
        return rejected(400, message, code="unsupported_parameter", param=name)
    one_token = (asked.get("max_completion_tokens") or asked.get("max_tokens")) == 1
    if asked.get("temperature") not in (None, 0) and not one_token:  # whose text nobody reads
        message = "Unsupported value: 'temperature' must be 0."
        return rejected(400, message, code="unsupported_value", param="temperature")
    for name, only in (("n", 1), ("stream", False)):
        if asked.get(name) not in (None, only):
            message = f"Unsupported value: '{name}' must be {only}."
            return rejected(400, message, code="unsupported_value", param=name)
    return None


def _completion(model: Any, tokenizer: Any, asked: dict[str, Any]) -> dict[str, Any]:
    prompt = tokenizer.apply_chat_template(
        asked["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    limit = asked.get("max_completion_tokens") or asked.get("max_tokens") or DEFAULT_TOKENS
    ids, rows, ended = _greedy(model, prompt, _ends(model, tokenizer), limit)
    k = asked.get("top_logprobs") or 0
    tokens = [_token(tokenizer, i, row, k) for i, row in zip(ids, rows, strict=True)]
    text = tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True)
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": "stop" if ended else "length",
        "logprobs": {"content": tokens} if asked.get("logprobs") else None,
    }
    usage = {"prompt_tokens": prompt.shape[1], "completion_tokens": len(ids)}
    return {
        "id": "c",
        "object": "chat.completion",
        "created": 0,
        "model": asked.get("model"),
        "choices": [choice],
        "usage": usage | {"total_tokens": prompt.shape[1] + len(ids)},
    }


def _ends(model: Any, tokenizer: Any) -> set[int]:
    listed = model.generation_config.eos_token_id
    ids = listed if isinstance(listed, list) else [listed]
    return {i for i in (*ids, tokenizer.eos_token_id) if i is not None}


def _greedy(
    model: Any, prompt: Tensor, ends: set[int], limit: int
) -> tuple[list[int], list[Tensor], bool]:
    """Token ids with the log-probabilities [vocabulary] each was chosen from, and if it ended."""
    ids: list[int] = []
    rows: list[Tensor] = []
    last, cache = prompt, None
    while len(ids) < limit:
        passed = model(input_ids=last, past_key_values=cache, use_cache=True)
        cache = passed.past_key_values
        rows.append(passed.logits[0, -1].float().log_softmax(-1))
        ids.append(int(rows[-1].argmax()))
        if ids[-1] in ends:
            return ids, rows, True
        last = torch.tensor([[ids[-1]]])
    return ids, rows, False


def _token(tokenizer: Any, chosen: int, row: Tensor, k: int) -> dict[str, Any]:
    top = row.topk(min(k, len(row)))
    return _worded(tokenizer, chosen, float(row[chosen])) | {
        "top_logprobs": [
            _worded(tokenizer, i, value)
            for i, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]
    }


def _worded(tokenizer: Any, token: int, value: float) -> dict[str, Any]:
    text = tokenizer.decode([token])
    return {"token": text, "logprob": value, "bytes": list(text.encode())}


def main() -> None:
    parser = argparse.ArgumentParser(description="A chat server with true log-probabilities.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=0)
    given = parser.parse_args()
    over = threading.Event()
    for sign in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sign, lambda *_: over.set())
    with answering(responder(given.folder), given.port) as url:
        print(url, flush=True)
        over.wait()


if __name__ == "__main__":
    main()
