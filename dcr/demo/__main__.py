"""STL against DCR on the embedded model and corpus, from nothing to a table and a page.

One process does the work of six commands and names each where its part begins.
"""

import io
import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from dcr import entry, extensions, study
from dcr.core import config, storage
from dcr.core.config.training import TrainConfig, stages_of
from dcr.core.runs import Run
from dcr.study import Part

# DCR is preset=recommended behind one epoch of stage one, with a readout that learns faster and
# teaches greedy decoding as well. Without dropout SFT's rows share their beginnings.
METHODS = {
    "stl": ["method=stl"],
    "dcr": [
        *("preset=recommended", "method=dcr", "dcr.epochs=1"),
        *("sft.readout.greedy=1", "sft.readout.lr=2e-3"),
    ],
}
SHARED, ASKED = ["sft.lora.dropout=0"], ["gen.max_new_tokens=48"]
MODEL = "model=smollm2_135m"


@dataclass
class Options:
    """python -m dcr.demo [precision=fp32] [any setting of train.py or eval.py]

    Trains STL and DCR on the embedded model and corpus, evaluates both and the model before
    training, and writes a table and a page. The same command continues an interrupted demo.
    """

    out: Path = entry.option("where run folders and page lie", Path("outputs/demo"))
    settings: list[str] = entry.settings_of("train.py or eval.py")


@entry.command(Options, goes_on=True)
def main(options: Options) -> None:
    from dcr.report import building  # help and a slip need no drawing library

    out = options.out
    folders, page = [out / name for name in ("base", *METHODS)], out / "report.html"
    with study.notices_once():
        parts = _parts(out, options.settings)
    with storage.locked(out):
        for place, (part, by_hand) in enumerate(parts, start=1):
            if not part.done():
                print(f"[{place}/{len(parts)}] {part.job}: {part.name}")
                print(f"      {by_hand}", flush=True)
                part.work()
        table = building.build(folders, page)
    by_hand = _command("-m dcr.report", [*map(str, folders), f"out={page}"])
    print(f"\n{by_hand}\n\n{table}\n\npage: {page}")


def _parts(out: Path, given: Sequence[str]) -> list[tuple[Part, str]]:
    """All parts in order, each with its command. Raises ConfigError for a wrong setting."""
    training, evaluating = study.split_settings(given)
    evaluating = [*ASKED, *evaluating]
    jobs: dict[str, study.Job] = {}
    parts: list[tuple[Part, str]] = []
    for name, words in METHODS.items():
        words, run = [*words, *SHARED, *training, f"run={out / name}"], Run(out / name)
        job = jobs[name] = study.job_of(out, name.upper(), words, evaluating)
        assert job.training is not None
        done, work = partial(_trained, job.training, run), partial(_train, job.training, run)
        parts.append((Part(job.name, "training", done, work), _command("train.py", words)))
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
        by_hand = _command("eval.py", [*words, *evaluating])
        parts += [(part, by_hand) for part in asked.parts()]
    return parts


def _command(script: str, words: Sequence[str]) -> str:
    """The command that does a part by hand, in a checkout or with the installed commands."""
    checkout = config.CONF.parent == config.PACKAGE.parent or script.startswith("-m")
    begins = f"python {script}" if checkout else f"dcr-{script.removesuffix('.py')}"
    return f"{begins} {shlex.join(words)}"


def _trained(settings: TrainConfig, run: Run) -> bool:
    """Whether the run is trained. Raises ConfigError where its settings or rows were others."""
    if not all(run.done(stage.value) for stage in stages_of(settings)):
        return False
    with redirect_stdout(io.StringIO()):
        _train(settings, run)
    return True


def _train(settings: TrainConfig, run: Run) -> None:
    from dcr import train as training_script  # with torch and Lightning

    extensions.hand_in_passes()
    training_script.train(settings, run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
