"""Random models of three blocks, small enough for Jacobians: what the kernel's tests share."""

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from dcr import models
from dcr.config import LoraConfig

VOCABULARY = 40
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}
GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 16,
    "n_layer": 3,
    "n_head": 2,
    "bos_token_id": None,
    "eos_token_id": 1,
}
FAMILIES: dict[str, Any] = {
    "qwen2 tied": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen2 untied": Qwen2Config(**SHAPE, tie_word_embeddings=False),
    "llama biased": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=8, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**SHAPE, head_dim=8, sliding_window=4),
    "gpt2": GPT2Config(**GPT2),
    "gpt2 untied": GPT2Config(**GPT2, tie_word_embeddings=False),
}


def made(family: str, dtype: torch.dtype = torch.float64, noise: float = 0.2) -> Any:
    """A random model whose gains and biases are not at the ones and zeros they start from."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(FAMILIES[family]).to(dtype).eval()
        for parameter in model.parameters():
            with torch.no_grad():
                parameter.add_(noise * torch.randn(parameter.shape, dtype=dtype))
    return model


def adapted(model: Any) -> PeftModel:
    """With a LoRA adapter that does something."""
    config = LoraConfig(rank=2, alpha=4, dropout=0.5, targets=["all-linear"])
    found: Any = models.add_lora(model, config, seed=0).to(next(model.parameters()).dtype)
    chance = torch.Generator().manual_seed(0)
    for name, parameter in found.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3, generator=chance)
    return found
