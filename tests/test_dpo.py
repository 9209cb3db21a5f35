"""DPO's preferences on a tiny run, and the run folder that comes out; its training where TRL is."""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import dpo
from dcr.core import prompts, refusal
from dcr.core.config import ConfigError, Kind, Precision, resolving
from dcr.core.models import Policy, folders
from dcr.core.runs import Run, last_stage
from dcr.frontier import comparing
from tests.tiny_run import trained, weights

READOUT = ("method=stl", "sft.readout.steps=2", "sft.readout.blocks=1", "sft.epochs=1")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("dpo")
    kinds = ("seemingly_toxic", "toxic")
    named = [f"sft.readout.{kind}=[{folder}/rows/{kind}.jsonl]" for kind in kinds]
    return trained(folder, *READOUT, *named)[0]


def opened(run: Run) -> tuple[Policy, prompts.ChatFormat]:
    policy = folders.open_adapter(run.stage("sft"), Precision.fp32)
    return policy, prompts.chat_format(policy.tokenizer, resolving.model_of(run.config(), False))


def test_toxic_prompts_prefer_the_refusal_and_others_the_answer(run: Run) -> None:
    policy, chat = opened(run)
    learnt, drawn = dpo.learnt(run), run.record()["rows"]
    assert [row.id for row in learnt] == [
        name for kind in ("seemingly_toxic", "toxic") for name in drawn[f"readout_{kind}"]["ids"]
    ]
    toxic = {tuple(chat.prompt_ids(row.prompt)): row.kind is Kind.toxic for row in learnt}
    refusals = set(refusal.refusal_openings(chat).tolist())
    found = dpo.preferences(policy, chat, learnt)
    assert len(found) == len(learnt)
    for each in found:
        opens = [each[key][0] in refusals for key in ("chosen_ids", "rejected_ids")]
        assert opens == ([True, False] if toxic[tuple(each["prompt_ids"])] else [False, True])


def made(run: Run, out: Path, patch: pytest.MonkeyPatch, *words: str) -> Run:
    patch.setattr(sys, "argv", ["dpo", str(run.folder), str(out), *words])
    dpo.main()
    return Run(out)


def test_what_comes_out_is_a_run_of_its_own_arm(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def moved(policy: Policy, data: Sequence[Any], out: Path, seed: int, given: Any) -> None:
        assert data, "pairs"
        assert (seed, given.lr) == (run.config()["seed"], 1e-3)
        for name, weight in policy.model.named_parameters():
            weight.data += 1 if "lora_B" in name else 0

    monkeypatch.setattr(dpo, "train", moved)
    dpoed = made(run, tmp_path / "dpo", monkeypatch, "--lr", "1e-3")
    before, after = weights(run.folder), weights(dpoed.folder)
    assert {name for name in before if name.startswith("sft/")} == after.keys(), "no readout"
    for name, weight in after.items():
        assert torch.equal(weight, before[name] + ("lora_B" in name)), name
    opened(dpoed)
    assert last_stage(dpoed.config()) == "sft"
    assert comparing.is_made_with(dpoed.config(), "method=stl data.label=dpo")
    assert not comparing.is_made_with(run.config(), "data.label=dpo")
    dpoed.rows_file.write_text('{"rows": {}}')
    with pytest.raises(ConfigError, match="has no readout; name a run"):
        dpo.learnt(dpoed)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's own
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_the_margin_of_the_preferred_answer_grows(run: Run, tmp_path: Path) -> None:
    policy, chat = opened(run)
    data = dpo.preferences(policy, chat, dpo.learnt(run))

    def margin() -> float:
        total = 0.0
        for each in data:
            for key, sign in (("chosen_ids", 1), ("rejected_ids", -1)):
                ids = torch.tensor([each["prompt_ids"] + each[key]])
                with torch.no_grad():
                    log_p = policy.model(input_ids=ids).logits[0].float().log_softmax(-1)
                start = len(each["prompt_ids"])
                places = range(start, ids.shape[1])
                total += sign * sum(float(log_p[i - 1, ids[0, i]]) for i in places)
        return total / len(data)

    before = margin()
    dpo.train(policy, data, tmp_path, 0, argparse.Namespace(lr=1e-2, beta=0.1, epochs=2))
    assert margin() > before + 1
    assert list(policy.model.peft_config) == ["default"]
