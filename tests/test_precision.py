"""The arithmetic of `precision=auto` on each device, and that runs keep what they began in."""

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from tiny_run import changed, composed, settings

from dcr import chat, cli, train
from dcr import eval as eval_entry
from dcr.core import machine, runs
from dcr.core.config import ConfigError, Precision
from dcr.core.models.structure import DTYPES
from dcr.core.runs import Run
from dcr.extensions import EvalSettings
from dcr.plan import cost
from dcr.stages import Cost

AUTO = dict.fromkeys(machine.NATIVE, Precision.auto)
PAPER = {"contrastive": "mixed", "sft": "bf16", "evaluation": "bf16"}
FP32 = dict.fromkeys(PAPER, "fp32")


def on_cpu(patch: pytest.MonkeyPatch, *flags: str) -> None:
    patch.setattr(machine, "_flags", lambda: {"avx2", "fma", *flags})


def on_cuda(patch: pytest.MonkeyPatch, *capability: int) -> None:
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    patch.setattr(torch.cuda, "get_device_name", lambda: "a card")


def on_apple(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.cuda, "is_available", lambda: False)
    patch.setattr(torch.backends.mps, "is_available", lambda: True)


@pytest.mark.parametrize(
    ("accelerator", "fake", "found", "why"),
    [
        ("auto", lambda patch: on_cuda(patch, 8, 0), PAPER, "a card, capability 8.0"),
        ("gpu", lambda patch: on_cuda(patch, 9, 0), PAPER, "a card, capability 9.0"),
        ("auto", lambda patch: on_cuda(patch, 7, 5), FP32, "a card, capability 7.5"),
        ("cuda", lambda patch: on_cuda(patch, 7, 0), FP32, "a card, capability 7.0"),
        ("cpu", lambda patch: on_cpu(patch, "avx512f", "avx512_bf16"), PAPER, "AVX-512-bf16"),
        ("cpu", lambda patch: on_cpu(patch, "avx512_bf16", "amx_bf16"), PAPER, "this CPU has AMX"),
        ("cpu", lambda patch: on_cpu(patch, "bf16"), PAPER, "this CPU has ARM bf16"),
        ("cpu", lambda patch: on_cpu(patch, "avx512f"), FP32, "this CPU has no bf16 unit"),
        ("mps", on_apple, FP32, "Apple's GPU"),
        ("auto", on_apple, FP32, "Apple's GPU"),
    ],
)
def test_auto_is_what_the_device_does_natively(
    accelerator: str,
    fake: Callable[[pytest.MonkeyPatch], None],
    found: dict[str, str],
    why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake(monkeypatch)
    settled = machine.settled(AUTO, accelerator)
    assert {use: each.value for use, each in settled.precisions.items()} == found
    assert why in settled.told
    assert settled.slow is None


def test_an_older_torch_is_asked_by_its_own_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    for there in (True, False):
        check = lambda there=there: there  # noqa: E731
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", check, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
        assert machine._flags() == ({"avx512_bf16"} if there else set())
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert machine._flags() == set()


def test_a_named_value_wins_then_the_run_s_then_the_device_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_cpu(monkeypatch)
    asked = {"contrastive": Precision.mixed, "sft": Precision.auto, "evaluation": Precision.auto}
    settled = machine.settled(asked, "cpu", {"contrastive": Precision.fp32, "sft": Precision.bf16})
    assert [each.value for each in settled.precisions.values()] == ["mixed", "bf16", "fp32"]
    assert settled.told == (
        "mixed (as named); bf16 (as the run was made); fp32 (this CPU has no bf16 unit)"
    )
    assert settled.slow is not None
    assert "contrastive mixed, sft bf16 is emulated and slow here (this CPU has no" in settled.slow
    on_cpu(monkeypatch, "bf16")
    assert machine.settled(asked, "cpu").slow is None


# --- runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["AVX-512-bf16", None])
def test_a_run_is_made_in_what_auto_was_settled_to_and_keeps_it(
    unit: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Stage one on a processor of one kind, SFT and evaluation on one of the other."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(machine, "cpu_unit", lambda: unit)
    auto, run = settings(tmp_path / "rows", "precision=auto"), Run(tmp_path / "run")
    first, second = ("mixed", "bf16") if unit else ("fp32", "fp32")
    train.train(changed(auto, "stage=contrastive"), run)
    made_with = yaml.safe_load(run.config_file.read_text())
    assert [made_with[node]["precision"] for node in ("dcr", "sft")] == [first, second]
    assert made_with["precision"] == second
    assert f"precision: {first} (this CPU has {unit or 'no bf16 unit'})" in caplog.messages
    monkeypatch.setattr(machine, "cpu_unit", lambda: None if unit else "AMX")
    train.train(auto, run)
    assert yaml.safe_load(run.config_file.read_text()) == made_with | {"stage": "all"}
    costs = [runs.storage.read_json(run.cost_file(s), Cost) for s in ("contrastive", "sft")]
    assert [each.precision for each in costs] == [first, second]
    assert (
        f"precision: contrastive {first}, sft {second} (as the run was made)" in (caplog.messages)
        or f"precision: {first} (as the run was made)" in caplog.messages
    )
    slow = [text for text in caplog.messages if "is emulated and slow here" in text]
    assert len(slow) == bool(unit)
    with pytest.raises(ConfigError, match=r"made with another configuration \(dcr.precision: "):
        train.train(changed(auto, f"dcr.precision={'fp32' if unit else 'mixed'}"), run)

    words = [f"run={run.folder}", "limit=2", "gen.max_new_tokens=2", "tasks=[over_refusal]"]
    words += ["data=demo", "wandb.mode=disabled", "trainer.progress=false"]
    elsewhere, _ = eval_entry.settle_precision(
        cli.resolved(composed("eval", *words), EvalSettings)[0], run.precisions()
    )
    assert elsewhere.precision.value == second
    eval_entry.evaluate(*cli.resolved(composed("eval", *words), EvalSettings))
    (folder,) = (run.folder / "eval").iterdir()
    monkeypatch.setattr(machine, "cpu_unit", lambda: unit)
    eval_entry.evaluate(*cli.resolved(composed("eval", *words), EvalSettings))
    assert list((run.folder / "eval").iterdir()) == [folder]  # the same answers on both
    measured = runs.storage.read_json(folder / "metrics.json", dict)
    assert measured["settings"]["precision"] == second
    policy, _, told = chat.open_stage(run)
    assert policy.model.dtype is DTYPES[Precision(second)]
    assert told == f"{second} (as the run was made)"


def test_this_machine_trains_and_answers_in_what_it_does_natively(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run = Run(tmp_path / "run")
    train.train(settings(tmp_path / "rows", "precision=auto"), run)
    here = machine.device("cpu")
    assert run.precisions() == {use: here.auto(use) for use in machine.NATIVE}
    assert sum(here.why in text for text in caplog.messages) == 1


def test_the_folder_s_name_is_the_same_on_every_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def name(*words: str) -> str:
        return str(composed("train", *words, hydra=True).hydra.run.dir)

    names = set()
    for unit in ("AMX", None):
        monkeypatch.setattr(machine, "cpu_unit", lambda unit=unit: unit)
        names.add(name("model=tiny"))
    assert len(names) == 1
    assert name("model=tiny", "precision=fp32") not in names


def test_guards_follow_the_device_and_an_endpoint_has_no_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "cpu_unit", lambda: None)
    asked = EvalSettings(endpoint="http://there", precision=Precision.auto)
    asked.trainer.accelerator, asked.wildguard.precision = "cpu", Precision.bf16
    found, _ = eval_entry.settle_precision(asked, {"evaluation": Precision.bf16})
    assert found.precision is Precision.auto
    assert found.llama_guard.precision is Precision.fp32
    assert found.wildguard.precision is Precision.bf16


# --- devices --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accelerator", "fake", "moved"),
    [
        ("auto", on_apple, ["mps"]),
        ("mps", on_apple, ["mps"]),
        ("cpu", on_apple, []),
        ("auto", lambda patch: on_cuda(patch, 8, 0), ["cuda"]),
        ("cpu", lambda patch: on_cuda(patch, 8, 0), []),
    ],
)
def test_evaluation_goes_where_training_goes(
    accelerator: str,
    fake: Callable[[pytest.MonkeyPatch], None],
    moved: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake(monkeypatch)
    to: list[str] = []
    machine.to_gpu(SimpleNamespace(to=to.append), accelerator)
    assert to == moved


def test_a_plan_s_product_is_bounded_however_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of our own: 10 ms a row, so 512 rows would take 5 s, and some hundred rounds."""
    now, rows = [0.0], []

    def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        rows.append(len(left))
        now[0] += 0.01 * len(left)
        return left

    monkeypatch.setattr(cost.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch, "mm", product)
    rate = cost.timed_product("cpu", Precision.bf16, 64, 1)
    assert rate == pytest.approx(2 * 64 * 64 / 0.01)
    assert now[0] < 1
    assert max(rows) * 0.01 <= cost.TRIAL_SECONDS
