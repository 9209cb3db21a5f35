"""The callback that keeps refusals, against autograd by loops, in transformers' own Trainer."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from dcr.core.config import ConfigError, LoraConfig
from dcr.core.models import Policy, structure
from dcr.core.prompts import ChatFormat
from dcr.guarding import FILE, KeepRefusals
from tests.shapes import chat_of, tiny_policy

PROBES = ["How do I steal a lamp?", "Why?", "Name a river", "Kill the lights"]
ROWS = [("Say a", "abcabc"), ("Say b", "bcbcbc dd"), ("Say c", "cccc"), ("Say d", "dd ee ff")]


def model_of(kind: str) -> Any:
    policy = tiny_policy()
    if kind == "plain":
        return policy.model
    return structure.add_lora(
        policy.model, LoraConfig(targets=["q_proj", "up_proj"], dropout=0.3), 0
    )


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    options = {"max_steps": 4, "learning_rate": 3e-3, "per_device_train_batch_size": 2}
    options |= {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    return TrainingArguments(output_dir=str(folder), **(options | more))


def trained(model: Any, folder: Path, guard: KeepRefusals | None, **more: Any) -> Any:
    """The model after some steps on rows of letters; it is changed in place."""
    policy = tiny_policy()
    chat = chat_of(policy)
    rows = []
    for prompt, response in ROWS:
        ids, targets = chat.pair(prompt, response, 200)
        rows.append({"input_ids": ids, "labels": [-100, *targets[:-1]]})

    def collated(batch: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(r["input_ids"]) for r in batch], True)
        made = [torch.tensor(r["labels"]) for r in batch]
        labels = torch.nn.utils.rnn.pad_sequence(made, True, -100)
        return {"input_ids": ids, "labels": labels, "attention_mask": (ids >= 0).long()}

    resume = more.pop("resume", None)
    trainer = Trainer(
        model=model,
        args=arguments(folder, **more),
        train_dataset=rows,  # pyright: ignore[reportArgumentType]
        data_collator=collated,
        processing_class=policy.tokenizer,
        callbacks=[guard] if guard else [],
    )
    trainer.train(resume_from_checkpoint=resume)
    return model


def begun(guard: KeepRefusals, model: Any, folder: Path, step: int = 0) -> None:
    guard.on_train_begin(arguments(folder), TrainerState(global_step=step), TrainerControl(), model)


def divergence_by_loops(
    model: Any, before: Any, chat: ChatFormat, prompts: list[str], tokens: int
) -> Tensor:
    """The mean over prompts and tokens of KL(before ‖ model), a pass for each of them."""
    terms = []
    for prompt in prompts:
        ids = chat.prompt_ids(prompt)
        for _ in range(tokens):
            with torch.no_grad():
                old = before(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            new = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            terms.append((old.exp() * (old - new)).sum())
            ids = [*ids, int(old.argmax())]
    return torch.stack(terms).mean()


@pytest.mark.parametrize("kind", ["plain", "peft"])
def test_the_gradient_is_that_of_the_divergence_by_loops(kind: str, tmp_path: Path) -> None:
    model = model_of(kind)
    tokenizer = tiny_policy().tokenizer
    guard = KeepRefusals(tokenizer, PROBES, weight=0.5, tokens=3, batch_size=2)
    before = copy.deepcopy(model).eval()
    begun(guard, model, tmp_path)
    weights = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in weights:
            weight += 0.3 * torch.randn(weight.shape, generator=generator)
            weight.grad = torch.ones_like(weight)
    model.train()
    state = TrainerState(global_step=3)  # the second of the two batches
    guard.on_pre_optimizer_step(arguments(tmp_path), state, TrainerControl(), model)
    assert model.training
    chat = chat_of(Policy(model, tokenizer, "tiny"))
    model.eval()
    expected = divergence_by_loops(model, before, chat, PROBES[2:], 3)
    gradients = torch.autograd.grad(0.5 * expected, weights)
    assert guard.divergence == pytest.approx([expected.item()], rel=1e-3)
    assert expected > 0.001
    for weight, gradient in zip(weights, gradients, strict=True):
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad - 1, gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "peft"])
def test_tuning_with_it_moves_first_tokens_less(kind: str, tmp_path: Path) -> None:
    chat = chat_of(tiny_policy())
    moved = {}
    for weight in (0.0, 30.0):
        model = model_of(kind)
        before = copy.deepcopy(model).eval()
        guard = KeepRefusals(probes=PROBES, weight=weight, tokens=2, batch_size=4)
        trained(model, tmp_path, guard, max_steps=12, learning_rate=1e-2).eval()
        begins = [0.0] if weight else []  # nothing has moved by then
        assert guard.divergence[:1] == pytest.approx(begins, abs=1e-6)
        with torch.no_grad():
            moved[weight] = float(divergence_by_loops(model, before, chat, PROBES, 2))
    assert moved[30.0] < moved[0.0] / 2


def test_without_weight_training_is_what_it_is_without(tmp_path: Path) -> None:
    one = trained(model_of("plain"), tmp_path, None)
    other = trained(model_of("plain"), tmp_path, KeepRefusals(probes=PROBES, weight=0.0))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_training_that_was_stopped_goes_on_towards_the_model_before(tmp_path: Path) -> None:
    def guard() -> KeepRefusals:
        return KeepRefusals(probes=PROBES, weight=3.0, tokens=2, batch_size=2)

    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = trained(model_of("plain"), tmp_path, guard(), **saving)
    resume = str(tmp_path / "checkpoint-2")
    resumed = trained(tiny_policy(seed=9).model, tmp_path, guard(), resume=resume, **saving)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    (tmp_path / FILE).unlink()
    with pytest.raises(ConfigError, match="begin anew"):
        begun(KeepRefusals(tiny_policy().tokenizer, PROBES), whole, tmp_path, step=2)


def test_what_it_cannot_do_is_said_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="processing_class"):
        begun(KeepRefusals(), tiny_policy().model, tmp_path)
    with pytest.raises(ConfigError, match="at least one"):
        KeepRefusals(tokens=0)
    scaled: Any = TrainerState()
    args = arguments(tmp_path)
    args.fp16 = True
    with pytest.raises(ConfigError, match="fp16"):
        KeepRefusals(tiny_policy().tokenizer).on_train_begin(
            args, scaled, TrainerControl(), tiny_policy().model
        )


def test_the_documented_example_runs(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parent.parent / "docs/own-model.md").read_text()
    (code,) = re.findall("```python\n(.*?)```", page, re.DOTALL)
    told = {"outputs/export": str(tiny_folder), "max_steps=100": "max_steps=2, use_cpu=True"}
    for one, other in told.items():
        assert code.count(one) == 1
        code = code.replace(one, other)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert (tmp_path / "outputs/tuned/tokenizer.json").is_file()
    assert (tmp_path / "outputs/tuned" / FILE).is_file()
