"""A model's architecture read from its configuration alone, without torch or transformers.

Only of the families whose every parameter is known here: Llama's and Qwen2's. Of any other model,
and of one with anything unusual, `read` knows nothing, and `cost` asks transformers to build it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcr.core import storage
from dcr.core.config import EMBEDDED_MODEL, ModelConfig

SIZES = {  # each at most this, as `models` refuses more
    "hidden_size": 2**18,
    "intermediate_size": 2**20,
    "num_hidden_layers": 1000,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "vocab_size": 2**24,
}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FORWARD = ("gate_proj", "up_proj", "down_proj")
# Words in a key behind which the configuration would make another model of it, or be refused.
UNUSUAL = ("implementation", "quantization", "auto_map", "rope_scaling")


@dataclass(frozen=True)
class Blueprint:
    """A decoder of equal blocks, each with one norm before attention and one before the rest."""

    depth: int
    width: int
    vocabulary: int
    tied: bool  # the head is the embedding
    matrices: dict[str, tuple[int, int]]  # of one block, rows and columns by the projection's name
    vectors: int  # further parameters of one block: norms and biases

    @property
    def block(self) -> int:
        """Parameters of one block."""
        return sum(rows * columns for rows, columns in self.matrices.values()) + self.vectors


def folder_of(config: ModelConfig) -> Path | None:
    """Where the model's files lie, if on this machine and outside the hub's cache."""
    if config.name == EMBEDDED_MODEL:
        place = storage.cache_folder() / EMBEDDED_MODEL
    else:
        place = Path(config.name)
    return place if (place / "config.json").is_file() else None


def read(config: ModelConfig) -> Blueprint | None:
    """Of the model that `models.architecture` would build, if it is a plain one."""
    said: Any = config.architecture
    if not said:
        folder = folder_of(config)
        try:
            said = json.loads((folder / "config.json").read_text("utf-8")) if folder else None
        except (OSError, ValueError):
            return None
    return _plain(said) if isinstance(said, Mapping) else None


def _plain(said: Mapping[str, Any]) -> Blueprint | None:
    family, sizes = said.get("model_type"), [said.get(name) for name in SIZES]
    fits = None not in sizes and all(
        _within(size, 1, most) for size, most in zip(sizes, SIZES.values(), strict=True)
    )
    unusual = [
        key for key, value in said.items() if value and any(word in str(key) for word in UNUSUAL)
    ]
    rope = said.get("rope_parameters") or {"rope_type": "default"}
    if (
        family not in ("llama", "qwen2")
        or not fits
        or unusual
        or said.get("hidden_act", "silu") != "silu"
        or type(said.get("tie_word_embeddings")) is not bool
        or not isinstance(rope, Mapping)
        or rope.get("rope_type") != "default"
        or not _within(said.get("max_position_embeddings"), 1, 2**40)
        or not _within(said.get("pad_token_id"), 0, said["vocab_size"] - 1)
    ):
        return None
    width, inner, depth, heads, groups, vocabulary = (int(size or 0) for size in sizes)
    each = said.get("head_dim") or width // heads
    if type(each) is not int or each % 2 or heads % groups or width % heads:
        return None
    asked, kept = heads * each, groups * each
    matrices = {
        "q_proj": (asked, width),
        "k_proj": (kept, width),
        "v_proj": (kept, width),
        "o_proj": (width, asked),
        "gate_proj": (inner, width),
        "up_proj": (inner, width),
        "down_proj": (width, inner),
    }
    biased = ATTENTION[:3] if family == "qwen2" else ()
    if family == "llama":
        biased += ATTENTION if said.get("attention_bias") else ()
        biased += FORWARD if said.get("mlp_bias") else ()
    return Blueprint(
        depth=depth,
        width=width,
        vocabulary=vocabulary,
        tied=said["tie_word_embeddings"],
        matrices=matrices,
        vectors=2 * width + sum(matrices[name][0] for name in biased),
    )


def _within(value: Any, least: int, most: int) -> bool:
    return value is None or (type(value) is int and least <= value <= most)
