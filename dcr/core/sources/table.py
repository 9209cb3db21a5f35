"""The named sources: the contents and the place of each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dcr.core.config import Kind
from dcr.core.sources import fields
from dcr.core.sources.apart import kept_apart, not_kept_apart
from dcr.core.sources.fields import Fields, Keep, by_pair, every, has, ungrouped, xstest_groups
from dcr.core.sources.jsonl import Row


@dataclass(frozen=True)
class Hub:
    """The arguments of `datasets.load_dataset`, and the map from its rows to the local keys."""

    id: str  # a hub id, or a file format (`json`, `csv`) with `data_files` among the options
    rows: int  # expected after the source's `keep`
    fields: Fields
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    gated: bool = False  # its terms must be accepted on the hub first

    def __str__(self) -> str:
        return " ".join(filter(None, (self.options.get("data_files", self.id), self.config)))


@dataclass(frozen=True)
class Source:
    kind: Kind
    licence: str
    hub: Hub | None = None
    file: str | None = None  # inside `data.root`
    rows: int | None = None  # expected of the file after `keep`
    keep: Keep = every
    groups: Callable[[Sequence[Row]], list[str | None]] = ungrouped  # sees rows before `keep`
    embedded: str | None = None  # file of this package
    split: str | None = None
    prompts_only: bool = False  # what stands under `response` is not for training
    part_of: str | None = None  # the source that holds all of this one's prompts
    final: bool = False  # its rows are kept apart, see `apart`


NOT_STATED = "not stated at the source"
CC_BY_NC = "CC-BY-NC-4.0"
GITHUB = "https://raw.githubusercontent.com"
STL = f"{GITHUB}/vinid/safety-tuned-llamas/36a4b8d5c2177ed165bf61f59b590161394f7f12/data"
OVERKILL = f"{GITHUB}/InvokerStark/OverKill/9551a7ff7b2cb18d178e64fb5cc95e4684311b3b/data"
DANGEROUS_Q = f"{GITHUB}/SALT-NLP/chain-of-thought-bias/e92a0efeb94e64eb68586d5c04a25af1415282d2"
ALPACA_EVAL = f"{GITHUB}/tatsu-lab/alpaca_eval/cd543a149df89434d8a54582c0151c0b945c3d20/results"
# AdvBench and HarmBench: the hub's copies are gated.
LLM_ATTACKS = f"{GITHUB}/llm-attacks/llm-attacks/098262edf85f807224e70ecd87b9d83716bf6b73/data"
HARMBENCH = f"{GITHUB}/centerforaisafety/HarmBench/8e1604d1171fe8a48d8febecd22f600e462bdcdd/data"
STRONGREJECT = f"{GITHUB}/alexandrasouly/strongreject/3432b2d696b428f242bd507df96d80f686571d5e"
SCANS = f"{GITHUB}/zouyingcao/SCANS/9dc20d2f1ce29d6b26ccd08c2d457c8ad64d5760/datasets"
FALSE_REFUSAL = f"{GITHUB}/mainlp/False-Refusal-Mitigation/916dcac6fb1c5fcccc9581471370645763c65ce6"
TRUTHFULQA_REVISION = "741b8276f2d1982aa3d5b832d3ee81ed3b896490"
COCONOT_REVISION = "2cbe16aabf9069f17e48c8daad8aeabc29469eb7"
ORBENCH_REVISION = "e36d8b80e81837c8a8f264bbb2a49f1b32c7e272"
PHTEST_REVISION = "4028806c1f41031ddd3d27ca1f284e566548c5d6"
JAILBREAKBENCH_REVISION = "886acc352a31533ffbcf4ef22c744658688086fc"
COCONOT_SAFETY = has("category", "Requests with safety concerns")


def _file(url: str, rows: int, to_fields: Fields, **options: str) -> Hub:
    """A file at a fixed commit, for what the hub does not have, read by `datasets` all the same."""
    return Hub(url.rpartition(".")[2], rows, to_fields, options={"data_files": url, **options})


def _hh_rlhf(folder: str, rows: int, column: str) -> Hub:
    options = {"data_dir": folder}
    return Hub("Anthropic/hh-rlhf", rows, fields.first_turn_of(column), options=options)


def _xstest(kind: Kind, label: str, rows: int) -> Source:
    hub = Hub("Paul/XSTest", rows, fields.xstest)
    keep = has("label", label)
    return Source(kind, "CC-BY-4.0", hub, "xstest/xstest_v2.jsonl", rows, keep, xstest_groups)


def _stl_evaluation(name: str, folder: str, rows: int) -> Source:
    hub = _file(f"{STL}/evaluation/{name}.json", rows, fields.bare, field="instructions")
    return Source(Kind.toxic, CC_BY_NC, hub, f"{folder}/{folder}.jsonl", rows)


def _oktest(name: str, file: str, rows: int) -> Source:
    hub = _file(f"{OVERKILL}/{name}.csv", rows, fields.prompt)
    return Source(Kind.seemingly_toxic, NOT_STATED, hub, f"oktest/{file}.jsonl", rows)


def _coconot(config: str, split: str, rows: int, to_fields: Fields) -> Hub:
    return Hub("allenai/coconot", rows, to_fields, config, split, COCONOT_REVISION)


def _orbench(config: str, rows: int) -> Hub:
    to_fields = fields.prompt_and_category
    return Hub("bench-llm/or-bench", rows, to_fields, config, revision=ORBENCH_REVISION)


def _phtest(tier: str, on_hub: int, file: str, in_file: int) -> Source:
    hub = Hub("furonghuang-lab/PHTest", on_hub, fields.phtest, revision=PHTEST_REVISION)
    keep = has("category", tier)
    return Source(Kind.seemingly_toxic, "MIT", hub, f"phtest/{file}.jsonl", in_file, keep)


def _jailbreakbench(kind: Kind, split: str) -> Source:
    to_fields = fields.columns(prompt="Goal", category="Category")
    where = ("JailbreakBench/JBB-Behaviors", 100, to_fields, "behaviors", split)
    return Source(kind, "MIT", Hub(*where, JAILBREAKBENCH_REVISION))


def _surgical(kind: Kind, split: str, rows: int, file: str, in_file: int) -> Source:
    url = f"{FALSE_REFUSAL}/dataset/splits/{split}.json"
    hub = _file(url, rows, fields.columns(prompt="instruction"))
    return Source(kind, "Apache-2.0", hub, f"surgical_vectors/surgical_{file}.jsonl", in_file)


def _surgical_orbench(split: str, rows: int) -> Source:
    file = f"pseudo_harmful_orbench_{split}"
    return _surgical(Kind.seemingly_toxic, f"or_bench_hard_{split}", rows, file, rows)


def _ours(folder: str, kind: Kind, split: str, keep: Keep = every) -> Source:
    file = f"{folder}/{kind.value}.{split}.jsonl"
    return Source(kind, "as this project", keep=keep, groups=by_pair, embedded=file, split=split)


SOURCES: dict[str, Source] = {
    "demo_seemingly_toxic": _ours("demo", Kind.seemingly_toxic, "train"),
    "demo_toxic": _ours("demo", Kind.toxic, "train"),
    "demo_toxic_matched": _ours("demo", Kind.toxic, "train", keep=fields.is_paired),
    "demo_normal": _ours("demo", Kind.normal, "train"),
    "demo_seemingly_toxic_heldout": _ours("demo", Kind.seemingly_toxic, "heldout"),
    "demo_toxic_heldout": _ours("demo", Kind.toxic, "heldout"),
    "demo_normal_heldout": _ours("demo", Kind.normal, "heldout"),
    "contrasts_seemingly_toxic": _ours("contrasts", Kind.seemingly_toxic, "train"),
    "contrasts_toxic": _ours("contrasts", Kind.toxic, "train"),
    "contrasts_seemingly_toxic_heldout": _ours("contrasts", Kind.seemingly_toxic, "heldout"),
    "contrasts_toxic_heldout": _ours("contrasts", Kind.toxic, "heldout"),
    # Seemingly toxic.
    "xstest_safe": _xstest(Kind.seemingly_toxic, "safe", 250),
    "coconot_contrast": Source(
        Kind.seemingly_toxic,
        "MIT",
        _coconot("contrast", "test", 379, fields.prompt_and_category),
        "coconot/coconot_contrast_eval.jsonl",
        379,
    ),
    "coconot_safety": Source(  # the others of the 379 are incomplete or unsupported requests
        Kind.seemingly_toxic,
        "MIT",
        _coconot("contrast", "test", 149, fields.prompt_and_category),
        "coconot/coconot_contrast_eval.jsonl",
        149,
        COCONOT_SAFETY,
        part_of="coconot_contrast",
    ),
    "coconot_contrast_pref": Source(
        Kind.seemingly_toxic,
        "MIT",
        _coconot(
            "pref",
            "train",
            927,
            fields.columns(prompt="prompt", response="chosen", category="category"),
        ),
        "coconot/coconot_contrast_pref.jsonl",
        927,
    ),
    "oktest": _oktest("OKTest", "oktest", 300),
    "oktest_heldout": _oktest("OKTest_heldout", "oktest_heldout", 50),
    "orbench_hard": Source(
        Kind.seemingly_toxic,
        "CC-BY-4.0",
        _orbench("or-bench-hard-1k", 1319),
        "orbench/or_bench_hard_1k.jsonl",
        1319,
    ),
    "phtest_harmless": _phtest("harmless", 2077, "phtest_harmless", 2077),
    # Of these 1,192 a local folder may hold only the sample that another benchmark published.
    "phtest_controversial": _phtest("controversial", 1192, "phtest_controversial_sample", 180),
    "falsereject_test": Source(
        Kind.seemingly_toxic,
        CC_BY_NC,
        Hub("AmazonScience/FalseReject", 1187, fields.prompt, split="test"),
    ),
    "jailbreakbench_benign": _jailbreakbench(Kind.seemingly_toxic, "benign"),
    # Toxic.
    "xstest_unsafe": _xstest(Kind.toxic, "unsafe", 200),
    "coconot_original": Source(  # the other 606 are unanswerable rather than toxic
        Kind.toxic,
        "MIT",
        _coconot("original", "test", 395, fields.prompt_and_category),
        keep=COCONOT_SAFETY,
    ),
    "orbench_toxic": Source(Kind.toxic, "CC-BY-4.0", _orbench("or-bench-toxic", 655)),
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
        _file(f"{STL}/training/safety_only_data_Instructions.json", 2483, fields.instruction),
        "stl_safety/safety_pairs.jsonl",
        2483,
    ),
    "harmfulqa": Source(
        Kind.toxic,
        "Apache-2.0",
        Hub("declare-lab/HarmfulQA", 1960, fields.columns(prompt="question", category="topic")),
        "harmfulqa/harmfulqa.jsonl",
        1960,
    ),
    "harmfulq": Source(
        Kind.toxic,
        "MIT",
        _file(f"{DANGEROUS_Q}/data/dangerous-q/toxic_outs.json", 200, fields.bare),
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
        _file(f"{LLM_ATTACKS}/advbench/harmful_behaviors.csv", 520, fields.columns(prompt="goal")),
        "advbench/advbench.jsonl",
        520,
    ),
    "harmbench": Source(  # the standard behaviours: the others need a context or a copyright check
        Kind.toxic,
        "MIT",
        _file(
            f"{HARMBENCH}/behavior_datasets/harmbench_behaviors_text_all.csv",
            200,
            fields.columns(
                prompt="Behavior", label="FunctionalCategory", category="SemanticCategory"
            ),
        ),
        keep=has("label", "standard"),
    ),
    "jailbreakbench": _jailbreakbench(Kind.toxic, "harmful"),
    "strongreject": Source(
        Kind.toxic,
        "MIT",
        _file(
            f"{STRONGREJECT}/strongreject_dataset/strongreject_dataset.csv",
            313,
            fields.columns(prompt="forbidden_prompt", category="category"),
        ),
    ),
    "sorrybench": Source(  # without its twenty mutations of each prompt
        Kind.toxic,
        "SORRY-Bench's own terms: no redistribution",
        Hub("sorry-bench/sorry-bench-202503", 440, fields.first_of_turns, gated=True),
        keep=has("label", "base"),
    ),
    # Normal.
    "alpaca": Source(
        Kind.normal,
        CC_BY_NC,
        Hub("yahma/alpaca-cleaned", 51760, fields.instruction),  # the edition that STL sampled
        "alpaca/alpaca_21k.jsonl",
        21392,
    ),
    "alpaca_eval": Source(
        Kind.normal,
        "Apache-2.0",
        _file(
            f"{ALPACA_EVAL}/text_davinci_003/model_outputs.json",
            805,
            fields.columns(prompt="instruction", category="dataset"),
        ),
        "alpaca_eval/alpaca_eval_805_davinci003.jsonl",
        805,
        prompts_only=True,  # the outputs are another model's, to be compared with
    ),
    # What steering vectors are computed from.
    "truthfulqa": Source(
        Kind.normal,
        "Apache-2.0",
        Hub(
            "truthfulqa/truthful_qa",
            817,
            fields.columns(prompt="question", category="category"),
            "generation",
            "validation",
            TRUTHFULQA_REVISION,
        ),
        "scans_vectors/truthfulqa_questions.jsonl",
        817,
        prompts_only=True,
    ),
    "scans_heldout_harmless": Source(
        Kind.normal,
        NOT_STATED,
        Hub(
            "text",
            100,
            fields.bare,
            options={"data_files": f"{SCANS}/Held-outHarmless.txt"},
        ),
        "scans_vectors/scans_heldout_harmless.jsonl",
        100,
    ),
    # A local folder may hold only those of its prompts that are AdvBench's.
    "surgical_harmful_train": _surgical(
        Kind.toxic, "harmful_train", 260, "harmful_train_advbench_part", 117
    ),
    # OR-Bench-Hard in three parts.
    "surgical_orbench_train": _surgical_orbench("train", 1055),
    "surgical_orbench_val": _surgical_orbench("val", 132),
    "surgical_orbench_test": _surgical_orbench("test", 132),
}


def _parts(name: str, tested: int, kept: int) -> dict[str, Source]:
    """The rows of a set that results here have looked at, and those kept apart for `data=final`."""
    whole = SOURCES[name]

    def part(keep: Keep, rows: int, final: bool) -> Source:
        hub = None if whole.hub is None else replace(whole.hub, rows=rows)
        return replace(
            whole,
            hub=hub,
            rows=rows,
            keep=lambda row: whole.keep(row) and keep(row),
            part_of=name,
            final=final,
        )

    return {
        f"{name}_test": part(not_kept_apart, tested, False),
        f"{name}_final": part(kept_apart, kept, True),
    }


SOURCES |= (
    _parts("coconot_contrast", 200, 179)
    | _parts("orbench_hard", 514, 805)
    | _parts("oktest", 203, 97)
    | _parts("phtest_harmless", 754, 1323)
    | _parts("advbench", 267, 253)
    | _parts("harmfulqa", 1555, 405)
)
