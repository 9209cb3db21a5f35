"""DPO's preferences on a tiny run, and the run folder that comes out; its training where TRL is."""

import importlib.util
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import dpo
from dcr import resolving
from dcr.core import prompts
from dcr.core.config import ConfigError, Kind, Precision
from dcr.core.models import Policy, folders
from dcr.core.refusal import opening as refusal
from dcr.core.runs import Run
from dcr.frontier import comparing
from dcr.stages import last_stage
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
    def moved(policy: Policy, data: Sequence[Any], lr: float, beta: float) -> None:
        assert data, "pairs"
        assert (lr, beta) == (1e-3, 0.1)
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


def test_log_probabilities_are_those_of_single_answers(run: Run) -> None:
    policy, chat = opened(run)
    data = dpo.preferences(policy, chat, dpo.learnt(run))[:5]
    found = dpo.margins(policy, data)
    for value, each in zip(found.tolist(), data, strict=True):
        truth = 0.0
        for key, sign in (("chosen_ids", 1), ("rejected_ids", -1)):
            ids = torch.tensor([each["prompt_ids"] + each[key]])
            with torch.no_grad():
                log_p = policy.model(input_ids=ids).logits[0].float().log_softmax(-1)
            places = range(len(each["prompt_ids"]), ids.shape[1])
            truth += sign * sum(float(log_p[i - 1, ids[0, i]]) for i in places)
        assert value == pytest.approx(truth, abs=1e-3)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's own
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_training_is_that_of_trl(run: Run, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportMissingImports]

    policy, chat = opened(run)
    data = dpo.preferences(policy, chat, dpo.learnt(run))
    data = [pair for seed in range(3) for pair in random.Random(seed).sample(data, len(data))]
    ours, _ = opened(run)
    losses = dpo.train(ours, data, 1e-2, 0.1)

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset  # token ids already; TRL would end answers that were cut

    settings = DPOConfig(
        output_dir=str(tmp_path), learning_rate=1e-2, beta=0.1, num_train_epochs=1,
        per_device_train_batch_size=dpo.BATCH, lr_scheduler_type="cosine", warmup_steps=dpo.WARMUP,
        train_sampling_strategy="sequential", use_cpu=True, bf16=False,
        gradient_checkpointing=False, logging_steps=1, save_strategy="no", report_to=[],
        disable_tqdm=True,
    )  # fmt: skip
    for name, weight in policy.model.named_parameters():
        weight.requires_grad_(".lora_" in name)
    rows = Dataset.from_list(list(data))
    trainer = Trainer(
        policy.model, args=settings, train_dataset=rows, processing_class=policy.tokenizer
    )
    trainer.train()
    told = [each["loss"] for each in trainer.state.log_history if "loss" in each]
    assert losses == pytest.approx([float(loss) for loss in told], abs=2e-3)
    assert losses[-1] < losses[0] - 0.01
    theirs = dict(policy.model.named_parameters())
    for name, weight in ours.model.named_parameters():
        if ".lora_" in name:
            torch.testing.assert_close(weight, theirs[name], rtol=1e-2, atol=1e-4)
