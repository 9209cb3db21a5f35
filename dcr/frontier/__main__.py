"""The command of dcr.frontier: each arm's answers at equal safety, and how the arms differ."""

import sys
from dataclasses import dataclass
from pathlib import Path

from dcr import entry
from dcr.frontier import Rule


@dataclass
class Options:
    """python -m dcr.frontier plan=<file> <run or folder of runs> ... [data=final]

    Compares the arms of a plan by generated answers at equal achieved safety, over its seeds. The
    runs were evaluated with eval.py tasks=[frontier] calibrate=<share>.
    """

    plan: Path = entry.option("the plan, a YAML file; docs/evidence.md lists its keys")
    data: str = entry.option("the label of the data whose answers are compared", "final")
    safety: float = entry.option(
        "the share of toxic prompts refused at which arms are compared", 0.8, least=0, most=1
    )
    verdict: str = entry.option(
        "what says whether an answer refuses: all of its text, the same with partly refused "
        "answers among the refusals, or its opening",
        Rule.outcome.value,
        choices=[rule.value for rule in Rule],
    )
    seed: int = entry.option("of the bootstrap", 0, least=0)
    out: Path | None = entry.option("a .json file of all numbers; not given: none", None)
    runs: list[str] = entry.option("run folders, or folders of them", [], rest=True)


@entry.command(Options)
def main(options: Options) -> None:
    from dcr.frontier import (
        comparing,
    )  # with torch, which help and a user's error need not wait for

    plan = comparing.plan_of(options.plan)
    record = comparing.record(
        plan, options.runs, options.data, options.safety, options.seed, Rule(options.verdict)
    )
    print(entry.plain_text(*comparing.tables(record)))
    if options.out is not None:
        comparing.write(options.out, record)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
