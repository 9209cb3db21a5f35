"""Write the dashboard of a W&B project: a workspace and a report with the same panels."""

import itertools
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcr import entry
from dcr.core import config, storage
from dcr.core.config import ConfigError, Kind
from dcr.core.runs import Run
from dcr.ending import single_line

TITLE = "Discernment: what contrastive refinement changes"
VIEW = "dcr"  # the workspace's name in its address, by which a second command finds it
SCORES = ("over_refusal/compliance", "safety/keyword_refusal", "discernment")
EXPLAINED = {  # the text above each group of panels in the report
    "Stage one": "The Circle loss falls to its floor within an epoch or two; held-out k-means "
    "accuracy says whether block ℓ parts the two kinds of prompts that it never saw.",
    "Safety tuning": "NLL per token of answers and of refusals. Held-out refusals that rise while "
    "the others fall are learnt by heart.",
    "Refusal probability": "By kind of prompt. With stage one, seemingly toxic prompts follow the "
    "normal ones; without it, the toxic ones.",
    "Kernel": "How far a step on one kind of prompt moves another (observer/trained on).",
    "Frontier": "Up and to the right is better: harmless prompts answered, toxic ones refused. "
    "A method that merely refuses less moves along the line of STL.",
    "Epochs and ratio": "The ablations of the paper's Tables 3 and 4, a point a run.",
    "Sweep": "One line a run, from what was set to what came of it.",
    "Completions": "Answers with every verdict; group by prompt to see runs side by side.",
}


@dataclass
class Options:
    """python -m dcr.dashboard [<run folder> ...] [project=dcr] [entity=<you or a team>]

    Writes the workspace and the report of a W&B project; a second time it updates them. Without an
    account, or with out=, it writes both as a specification into a JSON file.
    """

    runs: list[Path] = entry.option("runs to draw in the colour of their method", [], rest=True)
    project: str = entry.option("the W&B project, as wandb.project of the runs", "dcr")
    entity: str | None = entry.option("you or your team; not given: the account's own", None)
    out: Path | None = entry.option("a JSON file to write instead of asking W&B", None)


@entry.command(Options)
def main(options: Options) -> None:
    config.check_installed("wandb_workspaces", "dashboard", "python -m dcr.dashboard")
    methods = [(run, run.config()["method"]) for run in map(Run, options.runs)]
    from dcr import wandb_run

    made_with = {wandb_run.run_id(run): method for run, method in methods}
    os.environ["WANDB_SILENT"] = "true"  # before the import, which reads it
    import wandb
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    if options.out is None and wandb.login(prompt=False, verify=False):
        try:
            print(*_save(options, made_with), sep="\n")
        except (wandb.Error, WandbApiFailedError, ValueError, OSError) as error:
            reason = single_line(str(error) or repr(error), wandb.api.api_key or "", longest=200)
            raise ConfigError(
                f"project={options.project}: W&B refused ({reason}); see `wandb login` and entity="
            ) from error
        return
    file = options.out or Path("dashboard.json")
    workspace, report = specification(options.project, options.entity or "", made_with)
    views = {"workspace": workspace._to_model(), "report": report._to_model()}
    written = {
        name: {
            "displayName": view.display_name,
            "spec": view.spec.model_dump(mode="json", by_alias=True, exclude_none=True),
        }
        for name, view in views.items()
    }
    storage.write_json(file, {"project": options.project} | written)
    print(f"{file}: the specification; to apply it, log in (`wandb login`) and leave out= out")


def _save(options: Options, made_with: Mapping[str, str]) -> tuple[str, str]:
    """Create or update workspace and report at W&B; returns their addresses."""
    import wandb
    from wandb_workspaces.workspaces.interface import Workspace

    api = wandb.Api()
    entity = options.entity or api.default_entity
    if entity is None:
        raise ValueError("the key belongs to nobody")
    workspace, report = specification(options.project, entity, made_with)
    place = f"{entity}/{options.project}"
    if options.project in {project.name for project in api.projects(entity)}:
        mine = (known.id for known in api.reports(place) if known.display_name == TITLE)
        report.id = next(mine, "")
    report.save()  # creates the project as well
    workspace._internal_name = f"nw-{VIEW}-v"
    with suppress(ValueError):  # there is none yet
        known = Workspace.from_url(f"https://wandb.ai/{place}?nw={VIEW}")
        workspace._internal_id = known._internal_id
    workspace.save()
    return workspace.url, report.url


def specification(project: str, entity: str, made_with: Mapping[str, str]) -> tuple[Any, Any]:
    """The workspace and the report of a project, from the same groups of panels.

    `made_with` names the method of each W&B run that gets the colour of its method.
    """
    from wandb_workspaces.reports.v2 import interface as wr
    from wandb_workspaces.workspaces import interface as ws

    from dcr.report.columns import METHODS
    from dcr.report.figures import PALETTE
    from dcr.wandb_scores import AXES

    views = _training_views() | _evaluation_views()  # their keys are those that runs log
    shades = dict(zip(METHODS, itertools.cycle(PALETTE), strict=False))
    colours = {run: shades[method] for run, method in made_with.items() if method in shades}
    workspace = ws.Workspace(
        entity=entity,
        project=project,
        name="dcr",
        sections=[
            ws.Section(name=name, panels=panels, is_open=True) for name, panels in views.items()
        ],
        runset_settings=ws.RunsetSettings(
            run_settings={run: ws.RunSettings(color=colour) for run, colour in colours.items()},
            pinned_columns=[
                *("config:method.value", "config:seed.value"),
                *(f"config:{key.replace('.', '.value.')}" for key in AXES),  # as nodes are stored
                *(f"summary:eval/{key}" for key in SCORES),
            ],
        ),
    )
    blocks: list[Any] = [wr.TableOfContents()]
    for name, panels in views.items():
        grid = wr.PanelGrid(panels=panels, custom_run_colors={**colours})
        blocks += [wr.H2(name), wr.P(EXPLAINED[name]), grid]
    return workspace, wr.Report(project=project, entity=entity, title=TITLE, blocks=blocks)


def _curve(title: str, *keys: str, x: str = "trainer/global_step", **more: Any) -> Any:
    from wandb_workspaces.reports.v2 import interface as wr

    return wr.LinePlot(title=title, x=x, y=list(keys), **more)


def _training_views() -> dict[str, list[Any]]:
    from wandb_workspaces.reports.v2 import interface as wr

    from dcr.wandb_run import RESULTS

    return {
        "Stage one": [
            _curve("Circle loss", "contrastive/circle", "contrastive/circle/heldout"),
            _curve("Cosine within and across kinds", *(
                f"contrastive/{which}_cosine" for which in ("within", "across")
            )),
            _curve("Held-out k-means accuracy", "contrastive/kmeans_accuracy/heldout"),
            _curve("NLL", "contrastive/nll"),
        ],
        "Safety tuning": [
            _curve(f"NLL, {rows} rows", f"sft/nll/{rows}", f"sft/nll/{rows}/heldout")
            for rows in ("general", "refusal")
        ],
        "Refusal probability": [
            _curve(f"{stage}: {kind.value}", f"{stage}/refusal_probability/{kind.value}")
            for stage in RESULTS
            for kind in Kind
        ],
        "Kernel": [
            wr.LinePlot(title=stage, x="trainer/global_step", metric_regex=f"{stage}/kernel/.*")
            for stage in RESULTS
        ],
    }  # fmt: skip


def _evaluation_views() -> dict[str, list[Any]]:
    from wandb_workspaces.reports.v2 import interface as wr

    from dcr.wandb_scores import AXES

    swept = map(wr.Config, ("dcr.layer", "dcr.margin", *AXES))
    scores = (wr.SummaryMetric(f"eval/{key}") for key in SCORES)
    by_method = {"groupby": wr.Config("method"), "groupby_aggfunc": "mean"}
    compliance, refused, _ = SCORES
    return {
        "Frontier": [
            _curve(
                "Over SFT, by method", f"snapshot/{compliance}", x=f"snapshot/{refused}",
                title_x="toxic prompts refused", title_y="harmless prompts answered", **by_method,
            ),
            wr.ScatterPlot(
                title="Last weights", x=wr.SummaryMetric(f"eval/{refused}"),
                y=wr.SummaryMetric(f"eval/{compliance}"),
            ),
        ],
        "Epochs and ratio": [
            _curve(f"{score} against {axis}", f"eval/{score}", x=axis, title_x=axis, **by_method)
            for axis in AXES
            for score in SCORES
        ],
        "Sweep": [
            wr.ParallelCoordinatesPlot(
                title="What was set and what came of it",
                columns=[wr.ParallelCoordinatesPlotColumn(of) for of in (*swept, *scores)],
                layout=wr.Layout(w=24, h=10),
            )
        ],
        "Completions": [
            wr.WeavePanelSummaryTable(
                table_name="eval/completions", layout=wr.Layout(w=24, h=16)
            )
        ],
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
