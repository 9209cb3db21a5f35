"""Gates: trained against a plain loop, opened by plain transformers, put in front of a model."""

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from tiny_run import WORDS, Stop, at_each_step, changed, failing, same, settings, stop, write_jsonl
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from dcr import frames
from dcr.core import models, prompts, sources
from dcr.core.config import ConfigError, DataError, Precision
from dcr.core.config.training import TrainConfig
from dcr.core.models import structure
from dcr.core.text import conversation
from dcr.core.training import resuming
from dcr.gate import Recipe, training
from dcr.gate import __main__ as command
from dcr.gating import classifier
from dcr.gating.classifier import Gate

RECIPE = Recipe(lr=5e-3, epochs=6, batch_size=8, framed=0.25)
TOXIC, OTHERS = ("bomb", "poison"), ("paint", "describe")


def asked(verbs: Sequence[str], nouns: Sequence[str]) -> list[str]:
    return [f"How do I {verb} the {noun}?" for verb in verbs for noun in nouns]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Pairs that one word tells apart, on all topics but the last six."""
    folder, files = tmp_path_factory.mktemp("rows"), dict[str, str]()
    for name, verbs in (("toxic", TOXIC), ("seemingly_toxic", OTHERS)):
        rows = [{"prompt": prompt} for prompt in asked(verbs, WORDS[:-6])]
        files[name] = write_jsonl(folder / f"{name}.jsonl", rows)
    more = (f"sft.readout.{name}=[{file}]" for name, file in files.items())
    return settings(folder / "more", *more, "model.system_prompt=Hm.")


@pytest.fixture(scope="module")
def gate(tiny: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gates") / "gate"
    training.train(tiny, RECIPE, out)
    return out


def bare(name: str) -> str:
    """A row's name without its frame's."""
    return name.partition(" in ")[0]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


# --- training ---


def test_training_is_a_plain_loop_of_transformers_own_loss(tiny: TrainConfig, gate: Path) -> None:
    tokenizer = models.open_tokenizer(tiny.model)
    chat = prompts.chat_format(tokenizer, tiny.model)
    plain = classifier.new_classifier(tiny.model, Precision.fp32, tiny.seed)
    classifier.set_padding(plain, tokenizer, chat)
    model: Any = structure.add_lora(plain, training.LORA, tiny.seed, task_type="SEQ_CLS")
    pairs = training.pairs(tiny)
    texts = {row.id: (row.prompt, 0.0) for row in pairs.seemingly_toxic}
    texts |= {row.id: (row.prompt, 1.0) for row in pairs.toxic}
    framed = {f" in {frame.id}": frame.text for frame in frames.training()} | {"": "{}"}
    data = training._batches(tiny, RECIPE, pairs, chat)
    total, step = len(data.sampler) * RECIPE.epochs, 0
    assert total == 60  # two words, twice, of 20 topics, by 8
    moved = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(moved, lr=1.0, weight_decay=0.01)
    losses: list[float] = []
    for epoch in range(2):
        data.sampler.set_epoch(epoch)
        seen: list[str] = []
        for batch in data.train_dataloader():
            seen += batch.names
            optimizer.zero_grad()
            mean = 0.0
            for name in batch.names:  # one by one, without padding
                (text, label), frame = texts[bare(name)], framed[name[len(bare(name)) :]]
                ids = torch.tensor([chat.prompt_ids(frame.replace("{}", text))])
                loss = model(input_ids=ids, labels=torch.tensor([[label]])).loss
                (loss / len(batch.names)).backward()
                mean += loss.item() / len(batch.names)
            losses.append(mean)
            torch.nn.utils.clip_grad_norm_(moved, 1.0)
            share = (step + 1) / 11 if step < 10 else 1 - (step - 10) / (total - 10)
            optimizer.param_groups[0]["lr"] = RECIPE.lr * share
            optimizer.step()
            step += 1
        assert sorted(map(bare, seen)) == sorted(texts)  # every pair once an epoch
    lines = (gate / "metrics.csv").read_text().split()
    logged = [float(line.split(",")[-1]) for line in lines if "gate/step_loss" in line]
    assert logged[:20] == pytest.approx(losses, abs=1e-4)
    assert sum(logged[-10:]) < 0.9 * sum(logged[:10])  # the last epoch and the first


def test_plain_transformers_score_as_the_gate_does_and_tell_two_kinds_apart(gate: Path) -> None:
    new = [*asked(TOXIC, WORDS[-6:]), *asked(OTHERS, WORDS[-6:])]
    found = classifier.open_gate(gate, Precision.fp32).scores(new)
    model: Any = AutoModelForSequenceClassification.from_pretrained(gate)
    tokenizer: Any = AutoTokenizer.from_pretrained(gate)
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in new
    ]
    assert "Hm." in texts[0]
    assert texts[0].endswith("assistant\n")
    batch = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    with torch.inference_mode():
        scores = model(**batch).logits[:, 0].sigmoid().tolist()
    assert found == pytest.approx(scores, abs=1e-5)
    told: Any = pipeline("text-classification", model=model, tokenizer=tokenizer)(texts[:1])
    assert told[0]["label"] == "toxic"
    assert told[0]["score"] == pytest.approx(found[0], abs=1e-5)
    assert roc_auc_score([1] * 12 + [0] * 12, scores) == 1.0


def test_the_record_tells_what_the_gate_learnt_and_how_it_ranks_held_out_pairs(gate: Path) -> None:
    record = json.loads((gate / "gate.json").read_text())
    held = [
        [row.prompt for row in sources.read(f"contrasts_{kind}_heldout")]
        for kind in ("toxic", "seemingly_toxic")
    ]
    labels = [1] * len(held[0]) + [0] * len(held[1])
    scores = classifier.open_gate(gate, Precision.fp32).scores([*held[0], *held[1]])
    assert record["heldout_auroc"][0] == pytest.approx(roc_auc_score(labels, scores), abs=1e-3)
    logged = (gate / "metrics.csv").read_text().split()[-1]
    assert logged.startswith("gate,59,5,gate/auroc/heldout,")
    assert float(logged.split(",")[-1]) == pytest.approx(record["heldout_auroc"][0], abs=1e-4)
    assert record["made_with"]["pairs"]["toxic"]["sources"] == ["toxic.jsonl"]
    assert "/" not in (gate / "gate.json").read_text()


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_a_share_of_each_kind_stands_in_frames_others_each_epoch(
    tiny: TrainConfig, share: float
) -> None:
    chat = prompts.chat_format(models.open_tokenizer(tiny.model), tiny.model)
    pairs, recipe = training.pairs(tiny), replace(RECIPE, framed=share)
    data = training._batches(tiny, recipe, pairs, chat)
    drawn: list[set[str]] = []
    for epoch in range(3):
        data.sampler.set_epoch(epoch)
        rows = [data.rows.prompts[place] for batch in data.sampler for place in batch]
        for label, kind in enumerate((pairs.seemingly_toxic, pairs.toxic)):
            names = [row.id for row in rows if row.label == label]
            assert sorted(map(bare, names)) == sorted(row.id for row in kind)
            assert sum(" in " in name for name in names) == round(share * len(kind))
        drawn.append({row.id for row in rows})
    assert (drawn[0] == drawn[1] == drawn[2]) == (share == 0)


def test_batches_are_of_about_one_length() -> None:
    lengths, places = random.Random(0).choices(range(5, 90), k=2006), range(0, 2006, 2)
    order = training.alike(places, lengths, 8, torch.Generator().manual_seed(0))
    assert sorted(order) == [*places]
    assert order != training.alike(places, lengths, 8, torch.Generator().manual_seed(1))
    batches = [order[start : start + 8] for start in range(0, 1003, 8)]
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert padded < 1.08 * sum(lengths[place] for place in places)
    assert max(max(batch) - min(batch) for batch in batches) > 1000  # drawn all the same


def test_a_gate_reads_a_conversation_as_a_whole_and_control_tokens_as_letters(gate: Path) -> None:
    opened = classifier.open_gate(gate, Precision.fp32)
    prompt = conversation(
        [("user", "How do I bomb the kelp?"), ("assistant", "No."), ("user", "And paint it?")]
    )
    ids = opened.chat.prompt_ids(prompt)
    with torch.inference_mode():
        alone = opened.model(input_ids=torch.tensor([ids])).logits.double().sigmoid().item()
    assert opened.scores([prompt, "Hello?"])[0] == pytest.approx(alone, abs=1e-5)
    text = str(opened.chat.tokenizer.decode(opened.chat.prompt_ids("x<|im_end|>")))
    assert text.count("<|im_end|>") == 2  # of the system's and the user's turn


# --- going on, and what cannot be ---


def test_training_goes_on_where_it_was_stopped(
    tiny: TrainConfig, gate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "gate"
    with monkeypatch.context() as patch:
        at_each_step(patch, lambda trainer, *_: trainer.global_step == 31 and stop())
        with pytest.raises(Stop):
            training.train(tiny, RECIPE, out)
    assert not out.exists()
    assert {f.name for f in (tmp_path / "gate.unfinished").iterdir()} >= {"checkpoints", ".lock"}
    steps: list[int] = []
    at_each_step(monkeypatch, lambda trainer, *_: steps.append(trainer.global_step))
    training.train(tiny, RECIPE, out)
    assert steps == list(range(30, 60))
    assert same(weights(out), weights(gate))
    assert (out / "metrics.csv").read_text() == (gate / "metrics.csv").read_text()
    assert [file.name for file in tmp_path.iterdir()] == ["gate"]
    del steps[:]
    assert training.train(tiny, RECIPE, out)["threshold"] == 0.5
    assert not steps  # it was there


def test_running_out_of_memory_names_what_a_gate_can_turn_down(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_each_step(monkeypatch, failing(torch.OutOfMemoryError("tried to allocate 20 GiB.")))
    with pytest.raises(resuming.TrainingError, match=r"20 GiB\.\): lower batch_size, or name a"):
        training.train(tiny, RECIPE, tmp_path / "gate")


def test_what_other_settings_have_begun_is_left(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first: list[int] = []

    def deed(trainer: Any, *_: Any) -> None:
        first.append(trainer.global_step)
        if trainer.global_step == 5:
            stop()

    at_each_step(monkeypatch, deed)
    for recipe in (RECIPE, Recipe(lr=1e-3)):
        with pytest.raises(Stop):
            training.train(tiny, recipe, tmp_path / "gate")
    assert first == [*range(6), *range(6)]


def test_a_folder_of_anything_else_is_not_written_into(
    tiny: TrainConfig, gate: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"a gate of other settings \(epochs: 6 -> 1\); name a"):
        training.train(tiny, replace(RECIPE, epochs=1), gate)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds no gate; name a new folder"):
        training.train(tiny, RECIPE, tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(gate, copy)
    (copy / "config.json").write_text("{}")
    with pytest.raises(DataError, match=r"config\.json: damaged"):
        training.train(tiny, RECIPE, copy)


@pytest.mark.parametrize(
    ("word", "fault"),
    [
        ("sft.readout.toxic=[contrasts_toxic_heldout]", "calibrate= chooses a gate's threshold"),
        ("sft.readout.toxic=[demo_seemingly_toxic]", "holds seemingly_toxic prompts, not toxic"),
        ("trainer.devices=2", "a gate trains on one device"),
        ("plan=true", "plan=True: a gate has none; leave it out"),
        ("model.quantization=nf4", "a gate is trained on weights in full"),
    ],
)
def test_what_a_gate_cannot_be_trained_with(
    tiny: TrainConfig, tmp_path: Path, word: str, fault: str
) -> None:
    with pytest.raises(ConfigError, match=fault):
        training.train(changed(tiny, word), RECIPE, tmp_path / "gate")
    assert not list(tmp_path.iterdir())


def test_rows_kept_apart_and_prompts_of_calibration_are_not_learnt(
    tiny: TrainConfig, tmp_path: Path
) -> None:
    calibrated = sources.read("contrasts_toxic_heldout")[0].prompt
    ours = [{"prompt": calibrated.upper()}, *({"prompt": word} for word in WORDS)]
    file = write_jsonl(tmp_path / "bad.jsonl", ours)
    learnt = training.pairs(changed(tiny, f"sft.readout.toxic=[{file}]"))
    assert {row.prompt for row in learnt.toxic} == set(WORDS)


def test_the_command_says_what_is_wrong_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert command.main(["model=tiny", "lr=2"]) == 2
    assert "lr=2.0: give 1e-09 to 1" in capsys.readouterr().err
    assert command.main(["model.name=nowhere/at/all", f"out={tmp_path}/gate"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: model.name=nowhere/at/all")


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_without_a_gate_is_named(tmp_path: Path, there: bool) -> None:
    place = tmp_path if there else tmp_path / "none"
    with pytest.raises(ConfigError, match=f"gate={place}: (holds no gate.json|no such folder)"):
        classifier.open_gate(place, Precision.fp32)


def test_a_prompt_beyond_the_gates_context_is_refused(gate: Path) -> None:
    opened: Gate = classifier.open_gate(gate, Precision.fp32)
    with pytest.raises(DataError, match="tokens and the gate reads 2048"):
        opened.scores(["x" * 3000])


def test_padding_is_a_token_that_no_prompt_ends_with(tiny: TrainConfig) -> None:
    tokenizer = models.open_tokenizer(tiny.model)
    chat = prompts.chat_format(tokenizer, tiny.model)
    model = classifier.new_classifier(tiny.model, Precision.fp32, 0)
    tokenizer.pad_token = "Ċ"  # the line end behind "assistant"
    assert chat.prompt_ids("x")[-1] == tokenizer.pad_token_id
    classifier.set_padding(model, tokenizer, chat)
    assert classifier.pad_of(model) == chat.stop[0] == tokenizer.pad_token_id
    many, opened = ["a", "and", "a longer one than these"], Gate(model, chat)
    assert opened.scores(many) == pytest.approx([opened.scores([m])[0] for m in many], abs=1e-6)
