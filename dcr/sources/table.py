"""The named sources: what each holds, where it lives, and how its raw row maps onto our keys.

A row of a local folder (`data.root`) has the keys `id`, `prompt`, `label`, `category`, `response`
and `meta`. A hub row is first brought to those keys, so one predicate serves both places.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dcr.config import Kind
from dcr.sources.examples import normalised
from dcr.sources.jsonl import Row


def _every(_: Row) -> bool:
    return True


def _ungrouped(rows: Sequence[Row]) -> list[str | None]:
    return [None] * len(rows)


@dataclass(frozen=True)
class Hub:
    """Arguments of `datasets.load_dataset`, and how its row maps onto the local keys."""

    id: str  # a hub id, or a file format (`json`, `csv`) with `data_files` among the options
    rows: int  # expected after the source's `keep`
    fields: Callable[[Row], Row]
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join(filter(None, (self.options.get("data_files", self.id), self.config)))


@dataclass(frozen=True)
class Source:
    kind: Kind
    licence: str
    hub: Hub | None = None
    file: str | None = None  # inside `data.root`
    rows: int | None = None  # expected of the file after `keep`
    keep: Callable[[Row], bool] = _every
    groups: Callable[[Sequence[Row]], list[str | None]] = _ungrouped  # sees rows before `keep`
    demo: str | None = None  # file of the embedded corpus
    split: str | None = None
    prompts_only: bool = False  # what stands under `response` is not for training


# --- raw rows to our keys ---


def first_turn(transcript: str) -> str:
    """The first human turn of an HH-RLHF dialogue; empty if there is none."""
    _, _, rest = transcript.partition("\n\nHuman:")
    return re.split(r"\n\n(?:Assistant|Human):", rest, maxsplit=1)[0].strip()


def _columns(**names: str) -> Callable[[Row], Row]:
    """Our keys from the named columns; further columns are left out."""
    return lambda row: {key: row[column] for key, column in names.items()}


def _first_turn_of(column: str) -> Callable[[Row], Row]:
    return lambda row: {"prompt": first_turn(row[column])}


def _instruction(row: Row) -> Row:
    given = row["input"]
    prompt = row["instruction"] + (f"\n\n{given}" if given else "")
    return {"prompt": prompt, "response": row["output"]}


def _xstest_row(row: Row) -> Row:
    base = {"prompt": row["prompt"], "label": row["label"], "category": row["type"]}
    return {**base, "meta": {"focus": row["focus"]}}


def _phtest_row(row: Row) -> Row:
    return {"prompt": row["Request"], "category": str(row["Harmfulness"]).strip().lower()}


def _has(key: str, value: str) -> Callable[[Row], bool]:
    return lambda row: row.get(key) == value


def _is_paired(row: Row) -> bool:
    return row.get("pair") is not None


# --- groups of rows that share a template ---


def _by_pair(rows: Sequence[Row]) -> list[str | None]:
    return [row.get("pair") for row in rows]


def xstest_groups(rows: Sequence[Row]) -> list[str | None]:
    """One group for all XSTest rows, safe or unsafe, that are linked by any of three things.

    Their focus word ("kill" appears in four types); their place within the type (the n-th safe row
    was written together with the n-th of its contrast type, and historical events have no focus
    word); and in the discrimination types how the prompt ends ("… not have equal rights?").
    """
    seen: Counter[str] = Counter()
    links: list[set[str]] = []
    for row in rows:
        category = str(row.get("category"))
        focus = str((row.get("meta") or {}).get("focus") or "").strip().casefold()
        contrast = category.removeprefix("contrast_")
        family = XSTEST_FAMILIES.get(contrast, contrast)
        link = {f"place:{family}:{seen[category]}"}
        seen[category] += 1
        if focus:
            link.add(f"focus:{focus}")
        if family in ("discr", "nons_group_real_discr"):
            link.add("end:" + " ".join(normalised(str(row.get("prompt"))).split()[-2:]))
        links.append(link)
    return [f"xstest-{component}" for component in _components(links)]


# Safe types whose contrasts carry another name.
XSTEST_FAMILIES = {"real_group_nons_discr": "discr", "privacy_fictional": "privacy"}


def _components(links: Sequence[set[str]]) -> list[int]:
    """The connected component of each item; items that share a link are connected."""
    nodes: dict[str, int] = {}
    for link in sorted(set().union(*links)):
        nodes[link] = len(links) + len(nodes)
    edges = [(item, nodes[link]) for item, own in enumerate(links) for link in sorted(own)]
    items, ends = zip(*edges, strict=True)
    size = len(links) + len(nodes)
    graph = coo_array(([1] * len(edges), (items, ends)), shape=(size, size))
    _, labels = connected_components(graph, directed=False)
    return [int(label) for label in labels[: len(links)]]


# --- the table ---

NOT_STATED = "not stated at the source"
CC_BY_NC = "CC-BY-NC-4.0"
GITHUB = "https://raw.githubusercontent.com"
STL = f"{GITHUB}/vinid/safety-tuned-llamas/36a4b8d5c2177ed165bf61f59b590161394f7f12/data"
OVERKILL = f"{GITHUB}/InvokerStark/OverKill/9551a7ff7b2cb18d178e64fb5cc95e4684311b3b/data"
DANGEROUS_Q = f"{GITHUB}/SALT-NLP/chain-of-thought-bias/e92a0efeb94e64eb68586d5c04a25af1415282d2"
ALPACA_EVAL = f"{GITHUB}/tatsu-lab/alpaca_eval/cd543a149df89434d8a54582c0151c0b945c3d20/results"
ADVBENCH = f"{GITHUB}/llm-attacks/llm-attacks/main/data/advbench"  # the hub's copy is gated

_prompt = _columns(prompt="prompt")
_prompt_and_category = _columns(prompt="prompt", category="category")
_bare = _columns(prompt="text")  # what `datasets` calls the column of a bare list of strings


def _file(url: str, rows: int, fields: Callable[[Row], Row], **options: str) -> Hub:
    """A file at a fixed commit, for what the hub does not have, read by `datasets` all the same."""
    return Hub(url.rpartition(".")[2], rows, fields, options={"data_files": url, **options})


def _hh_rlhf(folder: str, rows: int, column: str) -> Hub:
    return Hub("Anthropic/hh-rlhf", rows, _first_turn_of(column), options={"data_dir": folder})


def _xstest(kind: Kind, label: str, rows: int) -> Source:
    hub = Hub("Paul/XSTest", rows, _xstest_row)
    keep = _has("label", label)
    return Source(kind, "CC-BY-4.0", hub, "xstest/xstest_v2.jsonl", rows, keep, xstest_groups)


def _stl_evaluation(name: str, folder: str, rows: int) -> Source:
    hub = _file(f"{STL}/evaluation/{name}.json", rows, _bare, field="instructions")
    return Source(Kind.toxic, CC_BY_NC, hub, f"{folder}/{folder}.jsonl", rows)


def _oktest(name: str, file: str, rows: int) -> Source:
    hub = _file(f"{OVERKILL}/{name}.csv", rows, _prompt)
    return Source(Kind.seemingly_toxic, NOT_STATED, hub, f"oktest/{file}.jsonl", rows)


def _coconot(config: str, split: str, file: str, rows: int, fields: Callable[[Row], Row]) -> Source:
    hub = Hub("allenai/coconot", rows, fields, config, split)
    return Source(Kind.seemingly_toxic, "MIT", hub, f"coconot/{file}.jsonl", rows)


def _demo(kind: Kind, split: str, keep: Callable[[Row], bool] = _every) -> Source:
    file = f"{kind.value}.{split}.jsonl"
    return Source(kind, "as this project", keep=keep, groups=_by_pair, demo=file, split=split)


SOURCES: dict[str, Source] = {
    "demo_seemingly_toxic": _demo(Kind.seemingly_toxic, "train"),
    "demo_toxic": _demo(Kind.toxic, "train"),
    "demo_toxic_matched": _demo(Kind.toxic, "train", keep=_is_paired),
    "demo_normal": _demo(Kind.normal, "train"),
    "demo_seemingly_toxic_heldout": _demo(Kind.seemingly_toxic, "heldout"),
    "demo_toxic_heldout": _demo(Kind.toxic, "heldout"),
    "demo_normal_heldout": _demo(Kind.normal, "heldout"),
    # Seemingly toxic.
    "xstest_safe": _xstest(Kind.seemingly_toxic, "safe", 250),
    "coconot_contrast": _coconot(
        "contrast", "test", "coconot_contrast_eval", 379, _prompt_and_category
    ),
    "coconot_contrast_pref": _coconot(
        "pref",
        "train",
        "coconot_contrast_pref",
        927,
        _columns(prompt="prompt", response="chosen", category="category"),
    ),
    "oktest": _oktest("OKTest", "oktest", 300),
    "oktest_heldout": _oktest("OKTest_heldout", "oktest_heldout", 50),
    "orbench_hard": Source(
        Kind.seemingly_toxic,
        NOT_STATED,
        Hub("bench-llm/or-bench", 1319, _prompt_and_category, "or-bench-hard-1k"),
        "orbench/or_bench_hard_1k.jsonl",
        1319,
    ),
    "phtest_harmless": Source(
        Kind.seemingly_toxic,
        NOT_STATED,
        Hub("furonghuang-lab/PHTest", 2077, _phtest_row),
        "phtest/phtest_harmless.jsonl",
        2077,
        _has("category", "harmless"),
    ),
    # Toxic.
    "xstest_unsafe": _xstest(Kind.toxic, "unsafe", 200),
    "hh_rlhf_red_team": Source(
        Kind.toxic, "MIT", _hh_rlhf("red-team-attempts", 38961, "transcript")
    ),
    "hh_rlhf_harmless_base": Source(  # unlabelled: many of these first turns are benign
        Kind.toxic,
        "MIT",
        _hh_rlhf("harmless-base", 42537, "chosen"),
        "hh_rlhf/hh_harmless_base_test_prompts.jsonl",
        2312,
    ),
    "stl_safety": Source(
        Kind.toxic,
        CC_BY_NC,
        _file(f"{STL}/training/safety_only_data_Instructions.json", 2483, _instruction),
        "stl_safety/safety_pairs.jsonl",
        2483,
    ),
    "harmfulqa": Source(
        Kind.toxic,
        "Apache-2.0",
        Hub("declare-lab/HarmfulQA", 1960, _columns(prompt="question", category="topic")),
        "harmfulqa/harmfulqa.jsonl",
        1960,
    ),
    "harmfulq": Source(
        Kind.toxic,
        "MIT",
        _file(f"{DANGEROUS_Q}/data/dangerous-q/toxic_outs.json", 200, _bare),
        "harmfulq/harmfulq.jsonl",
        200,
    ),
    "i_malicious_instructions": _stl_evaluation(
        "I-MaliciousInstructions", "i_malicious_instructions", 100
    ),
    "i_cona": _stl_evaluation("I-CoNa", "i_cona", 178),
    "i_controversial": _stl_evaluation("I-Controversial", "i_controversial", 40),
    "q_harm": _stl_evaluation("Q-Harm", "q_harm", 100),
    "advbench": Source(
        Kind.toxic,
        "MIT",
        _file(f"{ADVBENCH}/harmful_behaviors.csv", 520, _columns(prompt="goal")),
        "advbench/advbench.jsonl",
        520,
    ),
    # Normal.
    "alpaca": Source(
        Kind.normal,
        CC_BY_NC,
        Hub("yahma/alpaca-cleaned", 51760, _instruction),  # the edition that STL sampled
        "alpaca/alpaca_21k.jsonl",
        21392,
    ),
    "alpaca_eval": Source(
        Kind.normal,
        "Apache-2.0",
        _file(
            f"{ALPACA_EVAL}/text_davinci_003/model_outputs.json",
            805,
            _columns(prompt="instruction", category="dataset"),
        ),
        "alpaca_eval/alpaca_eval_805_davinci003.jsonl",
        805,
        prompts_only=True,  # the outputs are another model's, to be compared with
    ),
}
