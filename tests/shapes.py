"""Random models small enough for loops and Jacobians, and how the tiny one is spoken to."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from dcr import builtin
from dcr.core import prompts
from dcr.core.config import LoraConfig, ModelConfig
from dcr.core.models import Policy, structure
from dcr.core.prompts import ChatFormat

TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 260,
    "tie_word_embeddings": True,
}


def tiny_policy(seed: int = 0, **shape: Any) -> Policy:
    """Random blocks over bytes in fp32, two unless `shape` says otherwise."""
    settings = ModelConfig(name="tiny", label="tiny", layer=1, architecture=TINY | shape)
    return builtin.random_policy(settings, seed)


def chat_of(policy: Policy, **settings: Any) -> ChatFormat:
    return prompts.chat_format(policy.tokenizer, ModelConfig(name="tiny", **settings))


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
MIXED = ["sliding_attention", "sliding_attention", "full_attention"]
GPT_NEOX: dict[str, Any] = {**SHAPE, "rotary_pct": 0.5}
FAMILIES: dict[str, Any] = {
    "qwen2 tied": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen2 untied": Qwen2Config(**SHAPE, tie_word_embeddings=False),
    "llama biased": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=8, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**SHAPE, head_dim=8, sliding_window=4),
    "gemma3": Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=4, layer_types=MIXED),
    "gpt2": GPT2Config(**GPT2),
    "gpt2 untied": GPT2Config(**GPT2, tie_word_embeddings=False),
    "gpt_neox": GPTNeoXConfig(**GPT_NEOX),
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


def greedy(
    logits: Callable[[list[int]], Tensor], new: int, stop: Collection[int] = ()
) -> list[int]:
    """Token by token the likeliest of `logits(answer so far)`, to the first of `stop` with it."""
    answer: list[int] = []
    while len(answer) < new and not (answer and answer[-1] in stop):
        with torch.inference_mode():
            answer.append(int(logits(answer).argmax()))
    return answer


def next_logits(model: Any, ids: Sequence[int]) -> Tensor:
    """Logits [vocabulary] of what follows these tokens, by one plain pass."""
    return model(input_ids=torch.tensor([[*ids]])).logits[0, -1]


def generated(
    model: Any, ids: Tensor, mask: Tensor, tokens: int = 4
) -> tuple[list[list[int]], Tensor]:
    """Greedy tokens and their logits [batch, tokens, vocabulary] by transformers' own cache."""
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return output.sequences[:, ids.shape[1] :].tolist(), torch.stack(output.logits, 1)


def unevenly_set(model: Any) -> Callable[[], None]:
    """Modes and flags differ by module; the result checks that they and the weights are so again.

    Nor may a gradient or a hook be left.
    """
    model.train()
    structure.decoder_blocks(model)[0].eval()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]

    def check() -> None:
        assert all(torch.equal(value, weights[n]) for n, value in model.state_dict().items())
        assert [module.training for module in model.modules()] == modes
        assert [parameter.requires_grad for parameter in model.parameters()] == flags
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    return check


def adapted(model: Any) -> PeftModel:
    """With a LoRA adapter that does something."""
    config = LoraConfig(rank=2, alpha=4, dropout=0.5, targets=["all-linear"])
    found: Any = structure.add_lora(model, config, seed=0).to(next(model.parameters()).dtype)
    chance = torch.Generator().manual_seed(0)
    for name, parameter in found.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3, generator=chance)
    return found


REFUSAL, ANSWER = "I can't.", "Yes."
BRIEF = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}{{ '\nA\n' }}"  # few tokens


def outspoken_policy(depth: int) -> Policy:
    """Random blocks over bytes, with weights large enough to tell prompts apart."""
    made = tiny_policy(num_hidden_layers=depth, tie_word_embeddings=False)
    for weight in made.model.parameters():
        weight.data *= 1 if weight.dim() == 1 else 5
    return made


def block_outputs(model: Any, ids: Sequence[int]) -> list[Tensor]:
    """The output of each block [length, width] of one row, read with a hook of torch's own."""
    taken: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _m, _i, out: taken.append(out[0]))
        for block in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([list(ids)]))
    for hook in hooks:
        hook.remove()
    return taken


def refusing_policy() -> Policy:
    """Four blocks over bytes that say REFUSAL to prompts with enough "!" or "~", else ANSWER.

    "!" writes along one direction and "~" along another, uniform attention carries their share of
    the prompt to its end, and the head reads both as the refusal's first byte. From there each byte
    leads to the next, and the last to the end. Speak to it by BRIEF, which dilutes little.
    """
    made = tiny_policy(num_hidden_layers=4, intermediate_size=16, tie_word_embeddings=False)
    generator, width = torch.Generator().manual_seed(0), TINY["hidden_size"]
    harm, false, constant, *steps = range(width)

    def noise(*shape: int) -> Tensor:
        return 0.02 * torch.randn(*shape, generator=generator)

    def token(text: str) -> int:
        return made.tokenizer.encode(text, add_special_tokens=False)[0]

    embedded, head = noise(260, width), noise(260, width)
    embedded[:, [harm, false]] = 0
    embedded[:, constant] = 2  # keeps the norms from undoing an ablation
    embedded[token("!"), harm] = embedded[token("~"), false] = 2
    embedded[token("~"), harm] = 0.2
    head[token("I"), [harm, false, constant]] = torch.tensor([2.5, 2.5, 0.2])
    head[token("Y"), constant] = 1
    for text in (REFUSAL, ANSWER):
        for one, next_one in zip(text, [*text[1:], str(made.tokenizer.eos_token)], strict=True):
            if not embedded[token(one)].amax() > 3:
                embedded[token(one), steps.pop()] = 4
            head[token(next_one), embedded[token(one)].argmax()] = 8
    with torch.no_grad():
        made.model.model.embed_tokens.weight.copy_(embedded)
        made.model.lm_head.weight.copy_(head)
        for block in made.model.model.layers:
            value, out = noise(16, width), noise(width, width)
            value[:2] = out[[harm, false]] = 0  # nothing else writes along the two
            value[0, harm] = value[1, false] = 1
            out[harm, 0] = out[false, 1] = 0.4
            block.self_attn.q_proj.weight.zero_()
            block.self_attn.v_proj.weight.copy_(value)
            block.self_attn.o_proj.weight.copy_(out)
            for weight in block.mlp.parameters():
                weight.copy_(noise(*weight.shape))
            block.mlp.down_proj.weight[[harm, false]] = 0
    return made
