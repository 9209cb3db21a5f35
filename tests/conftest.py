"""Every test runs in one thread, without network, with checked array shapes, on a tiny model."""

import copy
import functools
import gc
import importlib
import logging
import os
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "WANDB__SAVE_REQUIREMENTS": "false",  # a list of all packages, in half of an evaluation's time
    "TOKENIZERS_PARALLELISM": "false",
    "COLUMNS": "100",  # which pytest-xdist sets to 80
}

from pathlib import Path
from typing import Any, get_type_hints

import jaxtyping
import pytest
import torch
from beartype import BeartypeConf, beartype
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

torch.set_num_threads(1)
os.fsync = lambda _: None  # no test pulls the plug, and a busy disk takes its time

typechecked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float as well
# Before any module of ours is imported: shapes and types in signatures are checked from here on,
# in every module that handles tensors.
CHECKED = (
    *(f"analyses.{name}" for name in ("claims", "ntk", "probability", "separability")),
    *(f"steering.{name}" for name in ("edits", "methods", "probe", "prompts", "scans")),
    *("steering.surgical", "steering.vectors"),
    *("fast", "activations", "core.data"),
    *("core.generation", "core.losses", "core.models", "core.passes", "core.prompts"),
    *("core.refusal", "core.statistics", "core.training"),
)
jaxtyped = jaxtyping.jaxtyped


def in_scope(thing: Any = None, *, typechecker: Callable[[Any], Any]) -> Any:
    """As `jaxtyped`, which the hook decorates everything with, in a third of the time of a run.

    That binds the arguments of each call, and checks them twice. Here a function opens a scope for
    the letters of its shapes, and one without shapes opens none.
    """
    if thing is None:
        return functools.partial(in_scope, typechecker=typechecker)
    try:
        written = " ".join(map(repr, get_type_hints(thing, include_extras=True).values()))
    except NameError:  # of what is imported for the type checker alone
        return jaxtyped(thing, typechecker=typechecker)
    if isinstance(thing, type) or "{" in written:  # a size that an argument names
        return jaxtyped(thing, typechecker=typechecker)
    checked = typechecker(thing)
    if "jaxtyping." not in written:
        return checked

    @functools.wraps(checked)
    def scoped(*args: Any, **kwargs: Any) -> Any:
        with jaxtyped("context"):
            return checked(*args, **kwargs)

    return scoped


jaxtyping.jaxtyped = in_scope
hook = jaxtyping.install_import_hook([f"dcr.{name}" for name in CHECKED], f"{__name__}.typechecked")

from dcr import extensions  # noqa: E402
from dcr.core.config.training import TrainConfig  # noqa: E402
from dcr.core.models import Policy  # noqa: E402
from dcr.core.prompts import ChatFormat  # noqa: E402
from tests.shapes import chat_of, tiny_policy  # noqa: E402

extensions.hand_in_passes()  # as the commands do

ROOT = Path(__file__).parent.parent
LONGEST = (  # of the test files, the longest first
    *("align", "goldens", "study", "processes", "resuming", "eval", "export", "calibration"),
    *("readout", "cli", "ntk", "report", "own", "search", "demo", "damage", "gate", "contrastive"),
)


def pytest_configure(config: pytest.Config) -> None:
    # pytest-xdist would begin with the file of most tests, and end with one of a few long ones
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first, so that no worker waits for another at the end."""
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_collection_finish() -> None:
    """Lets the collector pass over what imports have made, which no test lets go of."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture
def policy() -> Policy:
    """Two random blocks over bytes in fp32, fresh for each test."""
    return tiny_policy()


@pytest.fixture
def chat(policy: Policy) -> ChatFormat:
    return chat_of(policy)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same kind of model with its byte tokenizer as a local Hugging Face folder: read only."""
    folder, made = tmp_path_factory.mktemp("tiny-llama"), tiny_policy(seed=1)
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> list[str]:
    """Settings under which a job of a study or a search takes a second."""
    from tiny_run import overrides

    kept = [word for word in overrides(tmp_path_factory.mktemp("rows")) if word != "model=tiny"]
    others = ("data.evaluation", "dcr.epochs", "sft.epochs", "trainer.checkpoint")
    kept = [word for word in kept if not word.startswith(others)]
    pairs = [  # the smallest of those that come along
        f"{node}.{kind}=[registers_{kind}{part}]"
        for node, part in (("sft.readout", ""), ("calibration", "_heldout"))
        for kind in ("toxic", "seemingly_toxic")
    ]
    evaluated = "{over_refusal: [demo_seemingly_toxic_heldout], safety: [demo_toxic_heldout]}"
    return [
        *(*kept, *pairs, f"model.name={tiny_folder}", "model.layer=1"),
        "sft.lora.targets=[all-linear]",
        *(f"data.evaluation={evaluated}", "dcr.epochs=1", "sft.epochs=1", "limit=4"),
        "gen.max_new_tokens=3",
    ]


@pytest.fixture(scope="module")
def composed_once() -> Iterator[None]:
    """Lets Hydra compose a job once, however often a test gives its command again.

    Languages are loaded here, where all forks find them.
    """
    from dcr import study
    from dcr.core.evaluation import scoring

    scoring.is_foreign("")
    made, compose = dict[str, study.Job](), study.job_of

    def job_of(*given: Any) -> study.Job:
        if (key := repr(given)) not in made:
            made[key] = compose(*given)
        return copy.deepcopy(made[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "job_of", job_of)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Settings of a run of both stages that takes a second."""
    from tiny_run import settings

    return settings(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny: TrainConfig) -> Path:
    """Its run folder, trained without interruption: read only."""
    from dcr import train
    from dcr.core.runs import Run

    folder = tmp_path_factory.mktemp("whole") / "run"
    train.train(tiny, Run(folder))
    return folder


@pytest.fixture
def half(whole: Path, tmp_path: Path) -> Path:
    """The same run with stage one alone done."""
    run = tmp_path / "run"
    shutil.copytree(whole, run, ignore=shutil.ignore_patterns("sft*"))
    return run


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The text behind `error: ` on the only line of stderr that is not a log line."""
        lines = [line for line in self.err.splitlines() if not line.startswith("[")]
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: "), self.err
        return lines[0].removeprefix("error: ")


@pytest.fixture
def command(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., Ended]]:
    """`command("train.py", "model=tiny")` or `command("dcr.chat", …)`, run in an empty folder.

    In this process, from the last line of the script or the module's `main` on.
    """

    def call(script: str, *arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", [str(ROOT / script), *arguments])
        GlobalHydra.instance().clear()
        capfd.readouterr()
        code = 0
        try:
            if script.endswith(".py"):
                runpy.run_path(str(ROOT / script), run_name="__main__")
            else:
                room = (ROOT / script.replace(".", "/")).is_dir()
                module = importlib.import_module(f"{script}.__main__" if room else script)
                code = module.main(list(arguments))
        except SystemExit as ended:
            code = int(ended.code or 0)
        out, err = capfd.readouterr()
        return Ended(code, str(out), str(err))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DCR_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    for name in ("DCR_SWEEP", "HYDRA_FULL_ERROR"):  # set by the command, gone with the test
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield call
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None


@pytest.fixture(autouse=True)
def root_logger_left_alone() -> Iterator[None]:
    """Takes away what a command that ran in this process, as Hydra's do, logged through.

    Its handler writes to a stream that ends with the test, and the next test's log would fail.
    """
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    for handler in root.handlers[:]:
        if type(handler) is logging.StreamHandler and handler not in before:
            root.removeHandler(handler)
    root.setLevel(level)
