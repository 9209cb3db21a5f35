"""A gate in front of a model: prompts above a threshold are refused, and the model answers others.

`python -m dcr.gate` trains one. Here are its settings and their checks, and what its folder tells;
`classifier` scores prompts, and `answers` puts it in front of what is evaluated.
"""

from pathlib import Path
from typing import Any

from pydantic import ConfigDict
from typing_extensions import TypedDict

RECORD = "gate.json"  # in a gate's folder, beside weights and tokenizer
REFUSAL = "I'm sorry, but I can't help with that."


class Record(TypedDict):
    """`gate.json`: what a gate was trained on and how, and how it tells held-out prompts apart."""

    __pydantic_config__ = ConfigDict(extra="allow")  # pyright: ignore[reportGeneralTypeIssues]

    made_with: dict[str, Any]
    threshold: float
    refusal: str
