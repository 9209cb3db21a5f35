"""The commands by name: `dcr <command>`, with `dcr-train` and `dcr-eval` for the two of Hydra.

What trains and evaluates is imported behind the checks of the settings, so that help and a user's
error need no torch.
"""

import os
import runpy
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from dcr import cli, ending, extensions, launching, resolving
from dcr.core import config
from dcr.core.config import ConfigError
from dcr.core.runs import Run
from dcr.extensions import EvalSettings, TrainSettings

# Each but train and eval is `python -m dcr.<name>`.
COMMANDS = {
    "demo": "compare STL and DCR on the embedded model and corpus, in minutes: table and page",
    "train": "train the stages of a method into a run folder, or say what they cost (plan=true)",
    "eval": "evaluate a run, a model or an endpoint: completions, verdicts, metrics",
    "choice": "choose the layer and the sources of stage one",
    "align": "tune a model of your own, with every choice measured: STL, DCR, page, export",
    "augment": "write the answers that STL-aug learns, each checked; or harmless twins",
    "gate": "train a gate, a classifier in front of a model that refuses toxic prompts",
    "search": "search the settings of stage one, with a Pareto front",
    "study": "train and evaluate the jobs of a named study: table and page",
    "frontier": "compare the arms of a plan by generated answers at equal safety",
    "record": "write numbers of runs, with where they come from, into a file of the repository",
    "report": "make tables, figures and a page from run folders",
    "label": "have people label answers blind, and say how far people and judges agree",
    "inspect": "write answers and verdicts as logs for Inspect's viewer",
    "dashboard": "make the workspace and the report of a W&B project",
    "recalibration": "choose anew the bias of a model that was tuned further, in its folder",
    "export": "write a run's merged weights with tokenizer and model card",
    "chat": "talk to a run's result",
}

# Variables that give a process its place among the nodes: torchrun's, Slurm's, MPI's, LSF's, ours.
LAUNCHED = {
    *("TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "LSB_JOBID", "NODE_RANK"),
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
        return
    if (nodes := settings.trainer.num_nodes) > 1 and not LAUNCHED & os.environ.keys():
        raise ConfigError(
            f"trainer.num_nodes={nodes}: no launcher says which node this is, and the "
            "others would be waited for; start it with torchrun or srun on each node"
        )
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
        near = resolving.nearest(name, list(COMMANDS))
        offer = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}"
        ending.fail(f"{name}: no such command; {offer}", ConfigError.exit_code)
