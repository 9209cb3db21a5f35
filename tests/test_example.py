"""The example for reading: short, plain, and it does what the framework does."""

import ast
import importlib.util
import random
from pathlib import Path
from types import ModuleType

import pytest
import torch
from test_prompts import needs_smollm2

from dcr.core.models import Policy

FILE = Path(__file__).parent.parent / "examples" / "dcr_in_one_file.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dcr_in_one_file", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_short_and_plain() -> None:
    text = FILE.read_text()
    assert len(text.splitlines()) <= 200
    imported = {
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    others = {
        name for name in imported if str(name).partition(".")[0] in ("dcr", "lightning", "peft")
    }
    assert others == {"dcr.core.losses"}


@needs_smollm2
def test_it_prints_the_table_of_the_demo(
    example: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    example.main(["--tiny"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["base", "STL", "DCR"]
    rows = {line[:20].strip(): [float(cell) for cell in line[20:].split()] for line in lines[1:]}
    assert list(rows) == ["compliance, %", "keyword refusal, %", "discernment"]
    assert all(len(cells) == 3 for cells in rows.values())
    assert all(0 <= cell <= 1 for cell in rows["discernment"])
    assert rows["discernment"][0] != rows["discernment"][1], "training moved nothing"


def test_stage_one_trains_the_blocks_below_and_lowers_its_loss(
    example: ModuleType, policy: Policy
) -> None:
    from dcr.core.losses import circle_loss

    toxic, safe = example.rows("toxic.train")[:12], example.rows("seemingly_toxic.train")[:12]
    prompts = [example.prompt_ids(policy.tokenizer, row["prompt"]) for row in toxic + safe]
    labels = torch.tensor([1] * 12 + [0] * 12)

    def loss() -> float:
        states = []
        for ids in prompts:  # one by one, without padding
            out = policy.model(torch.tensor([ids]), output_hidden_states=True)
            states.append(out.hidden_states[1][0, -1])
        return circle_loss(torch.stack(states), labels, margin=0.25, scale=16.0).item()

    before, held = loss(), {k: v.clone() for k, v in policy.model.state_dict().items()}
    example.contrast(policy.model, policy.tokenizer, toxic, safe, 1, 20, random.Random(0))
    changed = {k for k, v in policy.model.state_dict().items() if not torch.equal(v, held[k])}
    assert changed
    assert all("layers.0." in name for name in changed)
    assert loss() < before


def test_stage_two_learns_the_pairs_and_leaves_the_weights_below_its_adapters(
    example: ModuleType, policy: Policy
) -> None:
    pairs = [{"prompt": "Say a.", "response": "aaaa"}] * 16
    model, tokenizer = policy.model, policy.tokenizer

    def nll() -> float:
        lead = example.prompt_ids(tokenizer, "Say a.")
        answer = tokenizer(f"aaaa{tokenizer.eos_token}", add_special_tokens=False)["input_ids"]
        logits = model(torch.tensor([lead + answer])).logits[0].log_softmax(-1)
        return -sum(logits[len(lead) - 1 + i, t].item() for i, t in enumerate(answer)) / len(answer)

    before, held = nll(), {k: v.clone() for k, v in model.state_dict().items()}
    example.tune(model, tokenizer, pairs, 30, 1e-2, random.Random(0))
    after = {k.replace(".base.", "."): v for k, v in model.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in held.items())
    assert nll() < before - 0.2
