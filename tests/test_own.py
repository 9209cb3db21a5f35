"""A user's own judge, task, steering and source: a file outside the package, named by its path."""

import copy
import csv
import hashlib
import json
import pickle
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dcr import cli, continuing, own, resolving, results, study, wandb_scores
from dcr import eval as eval_entry
from dcr.core import config, runs
from dcr.core.config import UserError
from dcr.extensions import EvalSettings
from dcr.report import __main__ as report
from tests import test_goldens, tiny_run

ROOT = Path(__file__).parent.parent
LAB = """
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dcr.core.evaluation.protocols import Change, Judge, Task

@dataclass
class Tone(Judge):
    labels = ("long", "short")
    words: list[str]
    least: int = 2

    def judge(self, answers):
        return ["long" if len(a.response) >= self.least else "short" for a in answers]

@dataclass
class Odd(Judge):
    labels = ("odd",)

    def judge(self, answers):
        return ["even" for _ in answers]

@dataclass
class Picky(Odd):
    least: int = 1

    def __post_init__(self):
        if self.least > 9:
            raise ValueError("least is 9 at most")

        if self.least < 0:
            raise KeyError("least")

@dataclass
class Silent(Judge):
    labels = ()

    def judge(self, answers):
        return []

@dataclass
class Typeless(Odd):
    least: "Nowhere" = 1

@dataclass
class Depth(Task):
    per: float = 1.0

    def measure(self, work):
        return {"toxic": {"blocks": work.policy().model.config.num_hidden_layers / self.per}}

@dataclass
class Lacking(Task):
    pass

class Plain(Task):
    def measure(self, work):
        return 1

@dataclass
class Damped(Change):
    by: float = 0.5

    @contextmanager
    def around(self, subject, policy):
        head = policy.model.get_output_embeddings()
        hook = head.register_forward_hook(lambda module, given, logits: -self.by * logits)
        yield
        hook.remove()
"""
QUIET = (
    *("gen.max_new_tokens=4", "limit=5", "wandb.mode=disabled", "precision=fp32"),
    *("trainer.accelerator=cpu", "trainer.progress=false"),
)
ASKED = (
    "judge=[keyword,own_lab:Tone,examples.judges:Patterns]",
    "tasks=[over_refusal,safety,own_lab:Depth,examples.tasks:Style]",
    *("own.Tone.words=[please]", "own.Depth.per=2", "own.Style.gram=2", "own.Patterns.within=50"),
)


def forget() -> None:
    """As in a new process, nothing of a user's own is imported."""
    own.load.cache_clear()
    sys.modules.pop("own_lab", None)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    path = [*sys.path]
    forget()
    yield
    forget()
    sys.path[:] = path


def spreadsheet(folder: Path) -> Path:
    """The tiny run's prompts of both kinds as a CSV file."""
    rows = tiny_run.write_rows(folder / "rows")
    with (folder / "prompts.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["text", "kind"])
        for kind in ("toxic", "seemingly_toxic"):
            for line in rows[kind].read_text().splitlines():
                table.writerow([json.loads(line)["prompt"], kind])
    return folder / "prompts.csv"


def command(folder: Path, script: str, *words: str) -> str:
    """Runs a command in a folder. Returns its output, or raises AssertionError with its error."""
    forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)  # as a folder that another test has left is still there
        return test_goldens.command(script, *words)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the user's file and a run whose toxic prompts came from a CSV file."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "own_lab.py").write_text(LAB)
    file = spreadsheet(folder)
    words = [word for word in tiny_run.overrides(folder / "rows") if "data.toxic" not in word]
    sources = ("data.toxic.source=examples.sources:Spreadsheet", f"own.Spreadsheet.file={file}")
    told = command(
        folder, "train.py", *words, *sources, "own.Spreadsheet.prompt=text", "run=run",
        "data.evaluation.safety=[examples.sources:Spreadsheet]",
        "data.evaluation.over_refusal=[examples.sources:Harmless]",
        f"own.Harmless.file={file}", "own.Harmless.prompt=text",
    )  # fmt: skip
    assert told.endswith("run\n")
    return folder


def named(lab: Path) -> list[str]:
    """The overrides that name the run's sources again, with their settings."""
    return [
        "data.evaluation.safety=[examples.sources:Spreadsheet]",
        "data.evaluation.over_refusal=[examples.sources:Harmless]",
        *(f"own.{name}.file={lab}/prompts.csv" for name in ("Spreadsheet", "Harmless")),
        *(f"own.{name}.prompt=text" for name in ("Spreadsheet", "Harmless")),
    ]


def measured(folder: Path) -> dict[str, dict[str, Any]]:
    """Every `metrics.json` of a run by the folder that holds it."""
    files = folder.glob("run/eval/*/metrics.json")
    return {file.parent.name: json.loads(file.read_text()) for file in files}


def test_from_a_file_of_ones_own_to_every_result(lab: Path) -> None:
    """A judge, a task, a source and a steering, through the commands, the frame and the page."""
    record = json.loads((lab / "run/rows.json").read_text())
    (made,) = record["own"].values()
    source = (ROOT / "examples/sources.py").read_bytes()
    assert made["sha256"] == hashlib.sha256(source).hexdigest()
    assert made["settings"]["file"] == f"{lab}/prompts.csv"

    command(lab, "eval.py", "run=run", *QUIET, *ASKED, *named(lab))
    ((folder, found),) = measured(lab).items()
    answers = [
        json.loads(line)["response"]
        for line in (lab / f"run/eval/{folder}/Spreadsheet.jsonl").read_text().splitlines()
    ]
    digest = hashlib.sha256(LAB.encode()).hexdigest()
    said = found["sets"]["Spreadsheet"]["judged"]
    long = sum(len(answer) >= 2 for answer in answers)
    assert said["Tone"]["labels"] == {"long": long, "short": len(answers) - long}
    assert said["Tone"]["own"] == {
        "path": "own_lab:Tone", "sha256": digest, "settings": {"words": ["please"], "least": 2}
    }  # fmt: skip
    assert {"complied", "partial", "refused", "invalid"} <= said["Patterns"].keys()
    assert found["sets"]["Spreadsheet"]["own"]["settings"]["prompt"] == "text"
    assert found["own"]["Depth"] == {
        "path": "own_lab:Depth", "sha256": digest, "settings": {"per": 2.0},
        "measured": {"toxic": {"blocks": 1.0}},
    }  # fmt: skip

    table = results.load(lab / "run").set_index(["quantity", "set", "judge"]).value
    assert table["long", "Spreadsheet", "Tone"] == long / len(answers)
    assert table["Depth/blocks", "", ""] == 1
    style = results.load(lab / "run").query("quantity == 'Style/words'").set_index("kind")
    words = [len(answer.split()) for answer in answers]
    assert style.value["toxic"] == pytest.approx(sum(words) / len(words))
    scores = wandb_scores.scored(found)
    assert scores["safety/long_Tone"] == long / len(answers)
    assert scores["Depth/toxic/blocks"] == 1
    assert "Spreadsheet/compliance_Patterns" in scores or not said["Patterns"]["complied"]

    steered = ("steering.method=own_lab:Damped", "own.Damped.by=0.25", *QUIET, *named(lab))
    command(lab, "eval.py", "run=run", *steered)
    other = next(of for name, of in measured(lab).items() if name != folder)
    assert other["settings"]["steering"]["settings"] == {"by": 0.25}
    assert set(results.load(lab / "run").edit) == {
        "", f"own_lab:Damped@{digest[:8]} by=0.25 strength=1.0"
    }  # fmt: skip

    report.main([str(lab / "run"), f"out={lab}/report.html"])
    page = (lab / "report.html").read_text()
    assert "Answers to toxic prompts that are long by Tone (own_lab:Tone), %" in page
    assert f"Depth (own_lab:Depth, source sha256 {digest})" in page

    with pytest.raises(
        AssertionError, match="judge=own_lab:Odd: says 'even', which is none of its"
    ):
        command(lab, "eval.py", "run=run", "judge=[own_lab:Odd]", *QUIET, *named(lab))

    # another version of the file reuses neither verdicts nor answers
    again = command(lab, "eval.py", "run=run", *QUIET, *ASKED, *named(lab))
    assert "Tone: 10 verdicts, all stored" in again
    (lab / "own_lab.py").write_text(LAB + "# another version\n")
    newer = command(lab, "eval.py", "run=run", *QUIET, *ASKED, *named(lab))
    assert re.search(r"Tone: 0 verdicts stored, \d+ to ask", newer)
    assert "Patterns: 10 verdicts, all stored" in newer
    command(lab, "eval.py", "run=run", *steered)
    assert len(measured(lab)) == 3


def test_a_run_imports_nothing(lab: Path, tmp_path: Path) -> None:
    """A class that its `config.yaml` names is imported only if the command names it too."""
    with pytest.raises(AssertionError, match="Harmless: this command does not name it"):
        command(lab, "eval.py", "run=run", *QUIET)

    (tmp_path / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n")
    file = tmp_path / "run" / "config.yaml"
    shutil.copytree(lab / "run", file.parent)
    made = yaml.safe_load(file.read_text())
    made["data"]["toxic"]["source"] = ["trap:Rows"]  # read again to tell what was trained on
    made["data"]["evaluation"] = {"over_refusal": ["trap:Rows"], "safety": ["demo_toxic"]}
    made["own"] = {"Rows": {"file": "x"}}
    made |= {"judge": ["trap:Judge"], "tasks": ["trap:Task"], "steering": {"method": "trap:Steer"}}
    file.write_text(yaml.safe_dump(made))
    command(tmp_path, "eval.py", "run=run", "tasks=[safety]", *QUIET)
    with pytest.raises(AssertionError, match="trap:Rows: this command does not name it"):
        command(tmp_path, "eval.py", "run=run", "tasks=[over_refusal]", *QUIET)
    assert not (tmp_path / "sprung").exists()


def test_rows_of_another_version_of_a_source_are_refused(lab: Path) -> None:
    record = json.loads((lab / "run/rows.json").read_text())
    path = "examples.sources:Spreadsheet"
    newer = record | {"own": {path: record["own"][path] | {"sha256": "0" * 64}}}
    with pytest.raises(UserError, match=rf"{path}: source sha256 \w+ -> source sha256 00000000"):
        continuing.check_rows(runs.Run(lab / "run"), newer, force=False)


def test_a_path_carries_its_settings_to_other_processes_and_is_text_on_disk() -> None:
    named = resolving.own_paths({"judge": ["lab:Tone"], "own": {"Tone": {"least": 2}}})["lab:Tone"]
    for copied in (pickle.loads(pickle.dumps(named)), copy.deepcopy(named)):
        assert (copied, copied.settings) == ("lab:Tone", {"least": 2})
    assert type(config.plain({"judge": [named]})["judge"][0]) is str


def checked(*words: str) -> None:
    """As `eval.py` checks before a model is loaded."""
    settings, run = cli.resolved(cli.compose("eval", words), EvalSettings)
    eval_entry.checked(settings, run)
    eval_entry.read(settings)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("judge=[no_lab:Tone]", "judge=no_lab:Tone: no module no_lab in {here} or the environment"),
        ("judge=[broken:Tone]", "broken cannot be imported (ModuleNotFoundError: No module named"),
        ("judge=[torn:Tone]", "judge=torn:Tone: torn cannot be imported (SyntaxError: "),
        ("judge=[own_lab:Tune]", "own_lab has no Tune; it has Tone, Odd, Picky, Silent"),
        ("tasks=[own_lab:Tone]", "Tone must be a dataclass that subclasses dcr.core.evaluation.pr"),
        ("tasks=[own_lab:Plain]", "Plain must be a dataclass that subclasses dcr.core.evaluation"),
        ("tasks=[own_lab:Lacking]", "tasks=own_lab:Lacking: Lacking must define measure"),
        ("steering.method=own_lab:Tone", "steering.method=own_lab:Tone: Tone must be a dataclass"),
        ("judge=[own_lab:Silent]", "judge=own_lab:Silent: needs labels"),
        ("judge=[own_lab:Tone]", "own.Tone.words: it needs a value"),
        ("judge=[own_lab:Tone] own.Tone.words=a", "own.Tone.words=a: give a list, as in key=[a,b]"),
        (
            "judge=[own_lab:Tone] own.Tone.words=[] own.Tone.least=x",
            "own.Tone.least=x: give a whole number",
        ),
        ("judge=[own_lab:Picky] own.Picky.least=10", "own.Picky: least is 9 at most"),
        (
            "judge=[own_lab:Picky] own.Picky.least=-1",
            "own.Picky: cannot be made (KeyError: 'least'); mend the class",
        ),
        ("judge=[own_lab:Typeless]", "own.Typeless: cannot be made (PydanticUserError: "),
        ("judge=[own_lab:Tone] own.Tone.lest=1", "own.Tone.lest: no such setting; did you mean le"),
        ("judge=[own_lab:Tone] own.Tune.least=1", "own.Tune: no setting names a class of this nam"),
        ("own.Tone.least=1", "own.Tone: no setting names a class of this name; name it as package"),
        ("judge=[own_lab:Tone] own.Tone=1", "own.Tone=1: set its fields, as own.Tone.<field>=val"),
        ("judge=[tone]", "judge=[tone]: choose one of keyword, llm, llama_guard, wildguard, moder"),
        ("tasks=[tone]", "tasks=[tone]: choose one of over_refusal, safety, discernment, ability"),
        ("judge=[a:Tone,b:Tone]", "judge=[a:Tone,b:Tone]: two are called Tone; rename the class"),
        ("data.evaluation.safety=[own_lab:Tone]", "own_lab:Tone: Tone must be a dataclass that s"),
        (
            "data.evaluation.safety=[examples.sources:Spreadsheet] own.Spreadsheet.file=no.csv",
            "toxic rows cannot be read (FileNotFoundError: ",
        ),
        (
            "judge=[examples.judges:Patterns] own.Patterns.refused=['(']",
            "own.Patterns.refused=[(]: missing ), unterminated subpattern",
        ),
    ],
)
def test_each_mistake_is_one_line(
    words: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (("own_lab", LAB), ("broken", "import nothing_of_it"), ("torn", "1 /")):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        checked("model=tiny", "trainer.accelerator=cpu", *words.split())
    assert told.format(here=tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_study_hands_settings_to_the_side_that_names_their_class() -> None:
    words = ["data.toxic.source=lab:Rows", "judge=[lab:Tone]", "own.Rows.file=a", "own.Tone.n=2"]
    training, evaluating = study.split_settings(words)
    assert training == ["data.toxic.source=lab:Rows", "own.Rows.file=a"]
    assert evaluating == ["judge=[lab:Tone]", "own.Tone.n=2"]
