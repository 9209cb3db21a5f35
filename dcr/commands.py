"""The commands by name: `dcr <command>`, with `dcr-train` and `dcr-eval` for the two of Hydra.

What trains and evaluates is imported behind the checks of the settings, so that help and a user's
error need no torch.
"""

import runpy
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from dcr import cli, ending, extensions, launching
from dcr.core import config
from dcr.core.config import ConfigError, resolving
from dcr.core.runs import Run
from dcr.core.text import nearest
from dcr.extensions import EvalSettings, TrainSettings

# Each but train and eval is `python -m dcr.<name>`.
COMMANDS = {
    "demo": "STL against DCR on the embedded model and corpus, in minutes: table and page",
    "train": "the stages of a method, into a run folder, or with plan=true what they cost",
    "eval": "a run, a model or an endpoint: completions, verdicts, metrics; also dcr-eval",
    "choice": "which layer and which sources stage one should use",
    "align": "a model of one's own: choices by measure, STL and DCR, page and export",
    "augment": "the answers that STL-aug learns, each checked",
    "gate": "a classifier to stand in front of a model: it refuses what it takes for toxic",
    "search": "a search over stage one: front, importances, the chosen point on test sets",
    "study": "a named study from its jobs to its table and page",
    "frontier": "arms of a plan compared on generated answers at equal achieved safety",
    "record": "numbers of runs into a file of the repository, with where they come from",
    "report": "tables, figures and a page from run folders",
    "label": "answers for people to label blindly, and how far people and judges agree",
    "inspect": "answers and verdicts of runs as logs of Inspect, for its viewer",
    "dashboard": "the workspace and the report of a W&B project",
    "recalibration": "a bias for weights that were tuned on, chosen anew, into their folder",
    "export": "merged weights with tokenizer and model card from a run",
    "chat": "talk to a run's result",
}


@hydra.main(version_base="1.3", config_path=str(config.CONF), config_name="train")
@cli.job
def _train(composed: DictConfig) -> None:
    settings = resolving.resolve(composed, TrainSettings)
    if settings.trainer.devices * settings.trainer.num_nodes > 1 and cli.is_sweep():
        raise ConfigError(
            f"trainer.devices={settings.trainer.devices} in a sweep: its processes would run the "
            "whole sweep again; use one device a job, or run the jobs one by one"
        )
    if settings.plan:
        from dcr import plan

        print(plan.describe(settings))
    else:
        from dcr.train import train as run_stages

        extensions.hand_in_passes()
        run_stages(settings, Run(cli.output_folder()))


@hydra.main(version_base="1.3", config_path=str(config.CONF), config_name="eval")
@cli.job
def _evaluate(composed: DictConfig) -> None:
    from dcr import eval as evaluation

    settings, run = cli.resolved(composed, EvalSettings)
    extensions.hand_in_passes()
    evaluation.evaluate(settings, run)


def train() -> None:
    """`python train.py` and `dcr-train`."""
    launching.register()
    cli.run(_train)


def evaluate() -> None:
    """`python eval.py` and `dcr-eval`."""
    launching.register()
    cli.run(_evaluate)


def main() -> None:
    """`dcr <command> …`: the command of that name with the words behind it."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        rows = [f"  {command:<13} {does}" for command, does in COMMANDS.items()]
        print("dcr <command> [--help] [key=value ...]", "", *rows, sep="\n")
    elif name in ("train", "eval"):
        # a script, since processes that Lightning starts for further devices run it again
        sys.argv = [str(Path(sys.argv[0]).with_name(f"dcr-{name}")), *rest]
        (train if name == "train" else evaluate)()
    elif name in COMMANDS:
        sys.argv = sys.argv[1:]
        runpy.run_module(f"dcr.{name}", run_name="__main__", alter_sys=True)
    else:
        near = nearest(name, list(COMMANDS))
        offer = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}"
        ending.fail(f"{name}: no such command; {offer}", ConfigError.exit_code)
