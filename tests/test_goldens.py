"""Goldens hold what commands printed, wrote and measured when they were last looked at.

Nothing here is true by itself: the goldens say only that a change of code changed no result. When
one is meant to change, `python tests/test_goldens.py [name ...]` writes it anew and prints what
changed, and the commit says why. All is observed through commands and files.
"""

import csv
import difflib
import html
import io
import json
import math
import os
import re
import runpy
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # as a script, tests is no package

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from safetensors.torch import load_file

from dcr import commands
from tests.servers import scripted
from tests.shapes import BRIEF, refusing_policy

ROOT = Path(__file__).parent.parent
GOLDENS = Path(__file__).parent / "goldens"
TOLERANCE = 2e-3  # relative: other CPUs round otherwise, and training carries that on
# Absolute, of an AUROC's interval: where two scores are level on one CPU and a last bit apart on
# another, the bootstrap draws other resamples, by which its ends moved by up to 0.0035.
INTERVAL = 5e-3
TRAINED = (
    *("model=tiny", "precision=fp32", "run=run", "seed=0", "trainer.threads=1"),
    "trainer.accelerator=cpu",
    *("trainer.progress=false", "wandb.mode=disabled", "data.normal.count=16"),
    *("data.safety.count=8", "data.seemingly_toxic.count=10", "dcr.batch_size=8"),
)
EVALUATED = (
    *("run=run", "wandb.mode=disabled", "limit=12", "gen.max_new_tokens=6", "precision=fp32"),
    *("tasks=[over_refusal,safety,refusal_probability,separability]", "sep.prompts=16"),
)


def command(script: str, *arguments: str) -> str:
    """The output of a command that runs in this process and the current folder.

    `script` is `train.py`, `eval.py`, `dcr` or a module. Raises AssertionError where it fails.
    """
    package = (ROOT / script.replace(".", "/")).is_dir()
    module = f"{script}.__main__" if package else script
    imported = sys.modules.pop(module, None)  # runpy warns of what another test has imported
    before, sys.argv = sys.argv, [str(ROOT / script), *arguments]
    GlobalHydra.instance().clear()
    said, complained = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(complained):
            if script.endswith(".py"):
                runpy.run_path(str(ROOT / script), run_name="__main__")
            elif script == "dcr":
                commands.main()
            else:
                runpy.run_module(script, run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            told = said.getvalue() + complained.getvalue()
            raise AssertionError(f"{script} {arguments}: {told}") from ended
    finally:
        sys.argv = before
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = None
        if imported is not None:
            sys.modules[module] = imported
    return said.getvalue()


# --- settings and help ----------------------------------------------------------------------------

SHOWN = (
    "train.py",
    "train.py preset=recommended model=llama3_8b data=paper --resolve",
    "eval.py",
    "eval.py model=qwen2_5_7b data=paper steering=surgical --resolve",
)


def settings(_: Path) -> dict[str, str]:
    """Every key of the two scripts with its value, as they stand and composed of other files."""
    lines = [f"{line} --cfg job" for line in SHOWN]
    return {line: command(*line.split()) for line in lines}


def helps(_: Path) -> dict[str, str]:
    """Every `--help`: of the two scripts, of `dcr` and of each command that it lists."""
    listed = command("dcr", "--help")
    names = [line.split()[0] for line in listed.splitlines()[2:]]
    modules = [f"dcr.{name}" for name in names if name not in ("train", "eval")]
    told = {script: command(script, "--help") for script in ("train.py", "eval.py", *modules)}
    return {f"{script} --help": text for script, text in ({"dcr": listed} | told).items()}


# --- both stages ----------------------------------------------------------------------------------


def chain(place: Path) -> dict[str, Any]:
    """Both stages, an evaluation and the report: everything that must not change unseen."""
    os.chdir(place)
    plan = command("train.py", *TRAINED, "plan=true")
    command("train.py", *TRAINED)
    command("eval.py", *EVALUATED)
    command("dcr.report", "run", "--table", "table1", "out=shown/report.html")
    (evaluation,) = Path("run/eval").iterdir()
    metrics = json.loads((evaluation / "metrics.json").read_text())
    return {
        "plan": told(plan),
        "config": yaml.safe_load(Path("run/config.yaml").read_text()),
        "rows": {
            name: [part["count"], part["fingerprint"][:12]]
            for name, part in json.loads(Path("run/rows.json").read_text())["rows"].items()
        },
        "logged": last_logged(Path("run/metrics.csv")),
        "weights": {
            f"{file.parent.name}/{name}": [float(one.norm()), float(one.flatten()[0])]
            for file in sorted(Path("run").glob("*/*.safetensors"))
            for name, one in sorted(load_file(file).items())
        },
        "evaluation": numbers(metrics),
        "table1": list(csv.reader(io.StringIO(Path("shown/table1.csv").read_text()))),
    }


TIMES = r"^time on|TFLOP|measured\)?$|threads"


def told(plan: str) -> list[str]:
    """A plan's lines without what the machine's speed decides: its times, and with them widths."""
    lines = (" ".join(line.split()) for line in plan.splitlines())
    return [line for line in lines if line.strip("─") and not re.search(TIMES, line)]


def last_logged(file: Path) -> dict[str, float]:
    """The last value of every logged quantity."""
    rows = csv.DictReader(io.StringIO(file.read_text()))
    kept = {row["key"]: float(row["value"]) for row in rows}
    return {key: value for key, value in sorted(kept.items()) if "second" not in key}


def numbers(tree: Any, prefix: str = "") -> dict[str, float]:
    """Every number of a document by its path, without seconds, memory and single prompts."""
    if isinstance(tree, bool) or not isinstance(tree, (dict, list, int, float)):
        return {}
    if isinstance(tree, (int, float)):
        return {prefix: tree}
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    left_out = (
        "seconds",
        "peak_memory_gib",
        "decoding",
        "values",
        "version",
        "mds",
        "labels",
        "contamination",
    )
    return {
        path: number
        for key, held in pairs
        if key not in left_out
        for path, number in numbers(held, f"{prefix}/{key}").items()
    }


def differences(golden: Any, now: Any, path: str = "") -> list[str]:
    """`path: golden -> now` wherever two documents differ by more than rounding."""
    if isinstance(golden, dict) and isinstance(now, dict):
        keys = sorted(golden.keys() | now.keys())
        return [d for k in keys for d in differences(golden.get(k), now.get(k), f"{path}/{k}")]
    if isinstance(golden, list) and isinstance(now, list) and len(golden) == len(now):
        pairs = enumerate(zip(golden, now, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{path}/{i}")]
    if isinstance(golden, float) and isinstance(now, (int, float)):
        least = INTERVAL if re.search(r"/auroc/(\w+/)?[12]$", path) else 1e-6
        near = now == pytest.approx(golden, rel=TOLERANCE, abs=least)
        return [] if near else [_told(path, golden, now)]
    return [] if golden == now else [_told(path, golden, now)]


def _told(path: str, golden: object, now: object) -> str:
    return f"{path}: {golden} -> {now}"


# --- the recommended preset: readout, tracking, kernel and claims ---------------------------------

QUICK = (
    *("precision=fp32", "trainer.threads=1", "trainer.accelerator=cpu", "trainer.progress=false"),
    "wandb.mode=disabled",
)
RECOMMENDED = (
    *(
        *QUICK,
        "preset=recommended",
        "method=dcr",
        "model=tiny",
        "model.architecture.num_hidden_layers=4",
    ),
    *("run=recommended", "data.seemingly_toxic.count=10", "data.safety.count=8"),
    *("data.normal.count=16", "dcr.ratio=2", "dcr.epochs=1", "dcr.batch_size=8"),
    *("dcr.nll.general_batch_size=2", "sft.readout.steps=4", "sft.readout.batch_size=8"),
    *("sft.readout.seemingly_toxic=[demo_seemingly_toxic]", "sft.readout.toxic=[demo_toxic]"),
    *("tracking.quantities=[refusal_probability,kernel]", "tracking.every_n_steps=2"),
    *("tracking.entk.prompts=3", "tracking.refusal_prob.prompts=3", "tracking.snapshots=2"),
)
SCORED = ("run=recommended", *QUICK, "limit=6", "gen.max_new_tokens=3")
ANALYSED = (
    *(*SCORED, "entk.prompts=3", "sep.prompts=6", "refusal_prob.prompts=3"),
    *("claims.pairs=2", "claims.prompts=3"),
)


def recommended(_: Path) -> dict[str, Any]:
    """Each quantity that is tracked or analysed, on weights of each stage and on snapshots."""
    command("train.py", *RECOMMENDED)
    run = Path("recommended")
    trained = {
        "rows": {
            name: [part["count"], part["fingerprint"][:12]]
            for name, part in json.loads((run / "rows.json").read_text())["rows"].items()
        },
        "logged": last_logged(run / "metrics.csv"),
        "readout": json.loads((run / "readout.json").read_text()),
        "weights": norms(run),
        "tracked": {
            str(file.relative_to(run).parent): kept(json.loads(file.read_text()))
            for file in sorted(run.glob("tracking/*/*/metrics.json"))
        },
        "files": files(run),
    }
    measured = ("refusal_probability", "kernel", "separability", "claims")
    before = f"tasks=[{','.join(measured)}]"
    after = f"tasks=[{','.join(('over_refusal', 'safety', 'discernment', *measured))}]"
    return trained | {
        "after SFT": evaluated("recommended", *ANALYSED, after),
        "after stage one": evaluated("recommended", *ANALYSED, before, "stage=contrastive"),
        "snapshots": evaluated("recommended", *SCORED, "snapshots=true"),
    }


def norms(run: Path) -> dict[str, list[float]]:
    """Norm and first entry of every tensor of a run's results."""
    return {
        f"{file.parent.name}/{name}": [float(one.norm()), float(one.flatten()[0])]
        for file in sorted(run.glob("*/*.safetensors"))
        for name, one in sorted(load_file(file).items())
    }


def evaluated(folder: str, *words: str) -> dict[str, Any]:
    """Runs `eval.py`; the metrics and files of each evaluation that it adds or changes there."""
    before = {file: file.read_bytes() for file in Path(folder).glob("eval/*/metrics.json")}
    command("eval.py", *words)
    now = sorted(Path(folder).glob("eval/*/metrics.json"))
    added = [file for file in now if before.get(file) != file.read_bytes()]
    assert added, f"eval.py {words} wrote no metrics"
    return {
        masked(file.parent.name): {
            "metrics": kept(json.loads(file.read_text())),
            "files": files(file.parent),
        }
        for file in added
    }


VOLATILE = ("seconds", "peak_memory_gib", "tokens_per_second", "decoding", "values", "mds")


def kept(tree: Any) -> Any:
    """A document without what differs from machine to machine; a list of words is one line."""
    if isinstance(tree, dict):
        return {masked(key): kept(held) for key, held in tree.items() if key not in VOLATILE}
    if isinstance(tree, list):
        if tree and all(isinstance(held, str) for held in tree):
            return masked(" ".join(tree))
        return [kept(held) for held in tree]
    return masked(tree) if isinstance(tree, str) else tree


def masked(text: str) -> str:
    """Without fingerprints of weights, ports, folders and versions."""
    text = text.replace(str(Path.cwd()), ".")
    return re.sub(r"\b[0-9a-f]{8,64}\b|(?<=127\.0\.0\.1:)\d+|\d+\.\d+\.\d+", "#", text)


def files(folder: Path) -> dict[str, str]:
    """Every file below a folder: of rows their number and keys, of tensors their shapes."""
    return {
        masked(str(file.relative_to(folder))): form(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def form(file: Path) -> str:
    if file.suffix == ".jsonl":
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        return f"{len(rows)} rows of {', '.join(dict.fromkeys(key for row in rows for key in row))}"
    if file.suffix == ".safetensors":
        shapes = [f"{name} {list(one.shape)}" for name, one in sorted(load_file(file).items())]
        return "; ".join(shapes[:3]) + f"; {len(shapes)} in all"
    if file.name.endswith("config.json") or file.suffix not in (".json", ".csv"):
        return ""
    if file.suffix == ".csv":
        return file.read_text().splitlines()[0]
    held = json.loads(file.read_text())
    return ", ".join(map(masked, held)) if isinstance(held, dict) else f"{len(held)} entries"


# --- a model that refuses: steering and calibration -----------------------------------------------

WORDS = (
    *("mill", "lake", "iron", "road", "tin", "kites", "wool", "bread", "salt", "oak", "maps"),
    *("clay", "lamp", "rope", "boat", "stone", "candle", "garden", "river", "window"),
)
MARKS = {"toxic": "!", "seemingly_toxic": "~", "normal": "."}
REFUSING = (  # its training moves no weight that matters
    *(*QUICK, "run=stl", "method=stl", "model.name=refusing", "model.template=brief.jinja"),
    *("data.normal.count=8", "data.safety.count=4", "sft.epochs=1", "sft.batch_size=8"),
    *("sft.lr=1e-9", "tracking.quantities=[refusal_probability]", "tracking.snapshots=2"),
    "tracking.refusal_prob.prompts=3",
)
ASKED = (
    *(*QUICK, "run=stl", "gen.max_new_tokens=10"),
    "data.evaluation.over_refusal=[rows/asked_seemingly_toxic.jsonl]",
    "data.evaluation.safety=[rows/asked_toxic.jsonl]",
    *(f"data.extraction.{kind}=[rows/learnt_{kind}.jsonl]" for kind in MARKS),
    *(f"calibration.{kind}=[rows/tried_{kind}.jsonl]" for kind in ("toxic", "seemingly_toxic")),
)
FEW = ("steering.surgical.train=8", "steering.surgical.validation=4")
EDITS = {
    "plain": ("tasks=[over_refusal,safety,discernment]",),
    "calibrated": ("calibrate=0.75",),
    "scans": (
        *("steering=scans", "steering.scans.layers=middle_third", "steering.scans.anchors=8"),
        "steering.strength=0.1",
    ),
    "surgical": (
        *("steering=surgical", *FEW, "steering.surgical.addition_kl=60"),
        "steering.surgical.ablation_kl=5",
    ),
    "ablation": ("steering=ablation", *FEW, "steering.strength=0.5"),
    "probe": ("steering=probe", "steering.probe.train=8"),
    "snapshots": ("snapshots=true",),
}


def steered(_: Path) -> dict[str, Any]:
    """A model that refuses what is marked, plain and under each edit, with its answers."""
    made = refusing_policy()
    made.model.save_pretrained("refusing")
    made.tokenizer.save_pretrained("refusing")
    Path("brief.jinja").write_text(BRIEF)
    Path("rows").mkdir(exist_ok=True)
    for part, words in {"asked": WORDS[:8], "tried": WORDS[12:], "learnt": WORDS[8:]}.items():
        for kind, mark in MARKS.items():
            rows = [
                {"id": f"{part}-{i}", "prompt": f"{word} {word}{mark * (4 + i)}"}
                if part == "learnt"
                else {"id": f"{part}-{i}", "prompt": f"{word} {word} {word}{mark * (1 + i)}"}
                for i, word in enumerate(words)
            ]
            text = "".join(f"{json.dumps(row)}\n" for row in rows)
            Path(f"rows/{part}_{kind}.jsonl").write_text(text)
    command("train.py", *REFUSING)
    found: dict[str, Any] = {}
    for name, words in EDITS.items():
        found[name] = evaluated("stl", *ASKED, *words)
        for file in [] if name == "snapshots" else newest("stl/eval/*/metrics.json"):
            found[name]["answers"] = answers(file.parent)
            if (record := file.with_name("steering.json")).is_file():
                found[name]["steering"] = kept(json.loads(record.read_text()))
    return found


def newest(pattern: str) -> list[Path]:
    return sorted(Path().glob(pattern), key=lambda file: file.stat().st_mtime_ns)[-1:]


def answers(folder: Path) -> dict[str, dict[str, list[Any]]]:
    """Each answer of an evaluation with the mass of refusals' first tokens."""
    return {
        file.stem: {
            row["id"]: [row["response"], row["refusal_mass"]]
            for row in map(json.loads, sorted(file.read_text().splitlines()))
        }
        for file in sorted(folder.glob("*.jsonl"))
    }


# --- servers that answer and judge ----------------------------------------------------------------

TOLD = ("No zebra for you: I cannot help.", "Sure, take these steps.", "Lemur: in part, I can't.")
LABELS = {"zebra": "2_full_refusal", "Lemur": "3_partial_refusal", "": "1_full_compliance"}


def served(body: dict[str, Any]) -> Any:
    """The server's reply as the model, its judge, its moderator or its annotator."""
    text = scripted.last_user(body)
    if body["model"] == "moderator":
        return scripted.moderated(violence="Sure" in text)
    if body["model"] == "judge":
        label = next(label for word, label in LABELS.items() if word in text)
        return scripted.completion(label, tokens=(100, 5))
    if body["model"] == "annotator":  # of the two answers only the reference's holds these words
        second = re.search(r"Yes\.|I can't\.", text.split('<answer by="M">')[1])
        reference, other = ("M", "m") if second else ("m", "M")
        better = "I can't." in text
        top = {reference: -0.2, other: -1.8} if better else {reference: -0.9, other: -0.7}
        return scripted.completion(reference, top=[top], tokens=(50, 1))
    return TOLD[zlib.crc32(text.encode()) % len(TOLD)]


def judged(_: Path) -> dict[str, Any]:
    """An endpoint's answers by keywords, a judge and a moderator; a win rate by an annotator."""
    with scripted.scripted(served) as server:
        of_judge = (f"llm.url={server.url}", "llm.model=judge", "llm.input_price=1")
        of_moderator = (f"moderation.url={server.url}", "moderation.model=moderator")
        asked = (f"endpoint={server.url}", "endpoint_model=told", "output=endpoint", "limit=12")
        asked += ("judge=[keyword,llm,moderation]", "wandb.mode=disabled", "llm.output_price=2")
        endpoint = evaluated("endpoint", *asked, *of_judge, *of_moderator)
        (metrics,) = newest("endpoint/eval/*/metrics.json")
        said = {
            file.stem: [row["response"] for row in map(json.loads, file.read_text().splitlines())]
            for file in sorted(metrics.parent.glob("*.jsonl"))
        }
        compared = ("tasks=[quality]", "quality.source=rows/asked_toxic.jsonl")
        compared += (f"annotator.url={server.url}", "annotator.model=annotator")
        quality = evaluated("recommended", *SCORED, *compared, "quality.reference=stl")
        bodies = sorted(server.bodies, key=lambda body: json.dumps(body, sort_keys=True))
    requests: dict[str, Any] = {}
    for body in bodies:
        sent = requests.setdefault(body["model"], {"first": kept(body), "count": 0})
        sent["count"] += 1
    del requests["annotator"]["first"]["messages"]
    told = {name: sorted(texts) for name, texts in said.items()}
    return {"endpoint": endpoint, "told": told, "quality": quality, "requests": requests}


# --- report, export and study ---------------------------------------------------------------------

FIGURES = ("1a", "1b", "3", "4", "5a", "5b", "6", "7", "8", "9", "operating_points")
TABLES = ("table1", "table2", "table3", "table4", "table5", "discernment")


def report(_: Path) -> dict[str, Any]:
    """The text of the page on three folders, and the values of each table and figure of all."""
    tables = [word for name in TABLES for word in ("--table", name)]
    figures = [word for name in FIGURES for word in ("--figure", name)]
    folders = ("run", "recommended", "endpoint")
    said = command("dcr.report", *folders, *tables, "--claims", "out=page/report.html")
    page = Path("page/report.html").read_text()
    command("dcr.report", *folders, "stl", *tables, *figures, "--claims", "out=all/report.html")
    return {
        "said": unnumbered(said),
        "page": [
            " ".join(unnumbered(re.sub(r"<[^>]+>", " ", html.unescape(found))))
            for found in re.findall(r"<(?:h\d|th|summary|figcaption)\b.*?>(.*?)</", page, re.S)
        ],
        "files": [str(file.relative_to("all")) for file in sorted(Path("all").rglob("*"))],
        "values": {file.name: cells(file) for file in sorted(Path("all").glob("*.csv"))},
    }


def unnumbered(text: str) -> Any:
    """The lines of a text without numbers, whose last digit rounding moves, and without rules."""
    lines = (" ".join(re.sub(r"[─━]+", " ", line).split()) for line in masked(text).splitlines())
    return [re.sub(r"[-−+]?\d*\.?\d+", "#", line) for line in lines if line]


def cells(file: Path) -> list[list[Any]]:
    """A CSV file's head and its rows, sorted by their words, with numbers as numbers.

    The order of evaluations is that of fingerprints, and MDS turns its axes as it likes.
    """
    head, *rows = csv.reader(io.StringIO(file.read_text()))
    told = [[cell(text) for text in row] for row in rows]
    for row in told:
        if file.stem == "table2" or set(VOLATILE) & set(row):  # time and memory
            row[:] = ["#" if isinstance(held, float) else held for held in row]
        if file.stem == "claims":  # sentences with numbers that have columns of their own as well
            row[:] = [re.sub(r"\d+\.\d+", "#", x) if isinstance(x, str) else x for x in row]
            if row[0] == "joint_movement":  # correlations of three steps, which rounding decides
                row[:] = ["#" if isinstance(held, float) else held for held in row]
    told.sort(key=lambda row: [word for word in row if isinstance(word, str)])
    return [head, *told] if file.stem != "figure8" else [head, [len(rows)]]


def cell(text: str) -> float | str:
    try:
        return float(text) if math.isfinite(float(text)) else text
    except ValueError:
        return masked(text)


def export(_: Path) -> dict[str, Any]:
    """Two exports, one of them calibrated: files, cards and numbers."""
    command("dcr.export", "run=recommended", "out=exported")
    command("dcr.export", "run=stl", "out=calibrated", "calibrate=0.75")
    return {
        name: {
            "files": files(Path(name)),
            "card": unnumbered(Path(name, "README.md").read_text()),
            "metrics": cells(Path(name, "metrics.csv")),
            "decoding": kept(json.loads(Path(name, "generation_config.json").read_text())),
        }
        for name in ("exported", "calibrated")
    }


STUDIED = (
    *(*QUICK, "study=epochs", "out=study", "model=tiny", "data.normal.count=8", "sft.epochs=1"),
    *("data.safety.count=4", "data.seemingly_toxic.count=6", "dcr.batch_size=8", "dcr.epochs=1"),
    *("limit=4", "gen.max_new_tokens=3"),
)


def study(_: Path) -> dict[str, Any]:
    """A study's jobs, files and table."""
    said = command("dcr.study", *STUDIED)
    folder = Path("study")
    return {
        "said": unnumbered(said),
        "files": files(folder),
        "table": {file.name: cells(file) for file in sorted(folder.glob("*.csv"))},
    }


# --- the files ------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Path], Any]] = {
    "settings.txt": settings,
    "help.txt": helps,
    "tiny_chain.json": chain,
    "recommended.json": recommended,
    "steered.json": steered,
    "judged.json": judged,
    "report.json": report,
    "export.json": export,
    "study.json": study,
}
# What must have run before in the same folder.
BEHIND = {
    "judged.json": ("recommended.json", "steered.json"),
    "report.json": ("tiny_chain.json", "judged.json"),
    "export.json": ("judged.json",),
}


class Folder:
    """A folder in which each part runs once, behind what it needs."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.made: dict[str, str] = {}

    def text(self, name: str) -> str:
        for needed in BEHIND.get(name, ()):
            self.text(needed)
        if name not in self.made:
            self.made[name] = written(name, PARTS[name](self.place))
        return self.made[name]


def written(name: str, made: Any) -> str:
    """The golden's text: JSON, or each command with what it printed."""
    if name.endswith(".json"):
        text = json.dumps(made, indent=0, ensure_ascii=False)
        # innermost lists on one line
        return re.sub(r"\[[^][{}]*\]", lambda found: found[0].replace("\n", ""), text) + "\n"
    return "\n".join(f"$ {line}\n{text.rstrip()}\n" for line, text in made.items())


def changes(name: str, golden: str, now: str) -> list[str]:
    """A line for each difference of two texts of a golden; of numbers, beyond rounding."""
    if name.endswith(".json"):
        return differences(json.loads(golden), json.loads(now))
    return list(difflib.unified_diff(golden.splitlines(), now.splitlines(), name, "now", n=0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Folder]:
    place, before = tmp_path_factory.mktemp("goldens"), Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DCR_SWEEP", "HYDRA_FULL_ERROR"):
            patch.delenv(name, raising=False)
        patch.setenv("DCR_CACHE", str(place / "cache"))
        yield Folder(place)
    os.chdir(before)


@pytest.mark.parametrize("name", PARTS)
def test_commands_do_what_they_did(
    name: str, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.place)
    changed = changes(name, (GOLDENS / name).read_text(), folder.text(name))
    assert not changed, "\n".join(changed[:40])


def test_a_changed_number_is_seen() -> None:
    golden = json.loads((GOLDENS / "tiny_chain.json").read_text())
    moved = json.loads((GOLDENS / "tiny_chain.json").read_text())
    name = next(iter(moved["weights"]))
    moved["weights"][name][0] *= 1.01
    assert differences(golden, moved)[0].startswith(f"/weights/{name}/0: ")
    ends = [path for path in moved["evaluation"] if path.endswith("first_token/auroc/mass/1")]
    moved = {**golden, "evaluation": dict(golden["evaluation"])}
    moved["evaluation"][ends[0]] += 0.006
    assert len(differences(golden, moved)) == len(ends) == 1


@pytest.mark.parametrize("name", PARTS)
def test_every_changed_value_is_seen(name: str) -> None:
    golden = (GOLDENS / name).read_text()
    assert changes(name, golden, golden) == []
    if name.endswith(".json"):
        count, moved = all_moved(json.loads(golden))
        assert len(changes(name, golden, json.dumps(moved))) == count > 0
    else:
        assert changes(name, golden, golden.replace("\n", " \n", 1))


def all_moved(tree: Any) -> tuple[int, Any]:
    """How many values a document holds, and the document with each of them changed."""
    if isinstance(tree, dict):
        moved = {key: all_moved(held) for key, held in tree.items()}
        return sum(n for n, _ in moved.values()), {key: held for key, (_, held) in moved.items()}
    if isinstance(tree, list):
        listed = [all_moved(held) for held in tree]
        return sum(n for n, _ in listed), [held for _, held in listed]
    if isinstance(tree, float):
        return 1, 2 * abs(tree) + 1
    return 1, f"not {tree}"


def main(arguments: Sequence[str]) -> None:
    """Write the goldens of these names anew, or all, and print what that changed."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as place:
        os.environ["DCR_CACHE"] = f"{place}/cache"
        os.chdir(place)
        folder = Folder(Path.cwd())
        for name in arguments or PARTS:
            text, file = folder.text(name), GOLDENS / name
            before = file.read_text() if file.exists() else "{}"
            file.write_text(text)
            print(*(line[:200] for line in changes(name, before, text)), sep="\n")
        os.chdir(ROOT)


if __name__ == "__main__":
    main(sys.argv[1:])
