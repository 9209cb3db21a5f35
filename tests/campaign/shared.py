"""Studies and searches: jobs and trials that share a folder or a database, one of them damaged."""

import csv
import shutil
from dataclasses import replace
from pathlib import Path
from random import Random

import commands
import damage
from commands import Ended
from overrides import SMALL

QUICK = (
    *(word for word in SMALL if word != "model=tiny"),
    *("model.name=../tiny", "model.layer=1", "model.epochs=1", "dcr.epochs=1", "sft.epochs=1"),
    *("sft.precision=fp32", "dcr.precision=fp32", "precision=fp32", "limit=4"),
    "gen.max_new_tokens=3",
    "data.evaluation={over_refusal: [demo_seemingly_toxic_heldout], safety: [demo_toxic_heldout]}",
)
STUDY = ("dcr.study", "study=epochs", "out=all", *QUICK)
MORE = "sft.lr=2e-3"  # other jobs, whose stage one is there
SEARCH = (
    *("dcr.search", "out=found", "trials=3", "data.validation=0.2", *QUICK),
    *("dcr.layer=1..2", "dcr.margin=0.1..0.4", "dcr.optim.lr=1e-3", "dcr.scale=16"),
    *("dcr.nll.weight=0.001", "dcr.ratio=null"),
)
TOLD = ("failed: ", "no stage one is taken over: ")  # lines of a study before its error


def prepare(base: Path) -> None:
    """A model as a folder, a study and a search that are done, and what the study gives in the end.

    Raises AssertionError where one of them fails.
    """
    from tests.shapes import tiny_policy

    made = tiny_policy(seed=1)
    made.model.save_pretrained(base / "tiny")
    made.tokenizer.save_pretrained(base / "tiny")
    for name, arguments in (("study", STUDY), ("search", SEARCH)):
        (base / name).mkdir()
        damage._good(arguments, base / name)
    shutil.copytree(base / "study", base / "studied")
    damage._good((*STUDY, MORE), base / "studied")


def study_case(rng: Random, place: Path, base: Path) -> tuple[str, Ended, list[tuple[str, str]]]:
    """One file of a study's run folders damaged, and a study that finds them beside its own."""
    shutil.copytree(base / "study", place, dirs_exist_ok=True)
    (place.parent / "tiny").symlink_to(base / "tiny")
    files = [p for p in sorted(place.glob("all/*/**/*")) if p.is_file() and p.name != ".lock"]
    file, how = damage.broken(files, rng)
    arguments = (*STUDY, MORE) if rng.random() < 0.6 else STUDY
    ended = commands.run(arguments, place)
    own = [line for line in ended.err.splitlines(keepends=True) if not line.startswith(TOLD)]
    faults = replace(ended, err="".join(own)).faults()
    name = str(file.relative_to(place))
    if ended.code not in (0, 1) and not ended.hung:
        faults.append(("good refused", f"all jobs end with {name}: {ended.err[-300:]}"))
    whole = base / ("studied" if MORE in arguments else "study")
    others = {k: v for k, v in _results(whole).items() if not k.startswith(str(file.parts[-1]))}
    got, job = _results(place), file.relative_to(place).parts[1]
    changed = sorted(k for k in others if k.split("/")[1] != job and got.get(k) != others[k])
    if changed and not faults:
        faults.append(("silent", f"{how} {name} changed {changed[:3]}"))
    return f"{how} {name}; {commands.spell(arguments)}", ended, faults


def _results(place: Path) -> dict[str, bytes]:
    """Adapters and answers of every job."""
    wanted = [*place.glob("all/*/sft/*.safetensors"), *place.glob("all/*/eval/*/*.jsonl")]
    return {str(file.relative_to(place)): file.read_bytes() for file in wanted if file.is_file()}


def search_case(rng: Random, place: Path, base: Path) -> tuple[str, Ended, list[tuple[str, str]]]:
    """A search's journal, damaged, and the same search again."""
    shutil.copytree(base / "search", place, dirs_exist_ok=True)
    (place.parent / "tiny").symlink_to(base / "tiny")
    how, hurt = rng.choice(damage.BYTES)
    hurt(place / "found" / "search.journal", rng)
    did = f"{how} search.journal"
    ended = commands.run(SEARCH, place)
    faults = ended.faults()
    if ended.code == 0 and _front(base / "search") != _front(place):
        faults.append(("silent", f"another front after {did}"))
    return f"{did}; {commands.spell(SEARCH)}", ended, faults


def _front(place: Path) -> list[dict[str, str]]:
    """What a search found, without the seconds: no two measurements of them agree."""
    with (place / "found" / "trials.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if "second" not in k} for row in csv.DictReader(file)]
