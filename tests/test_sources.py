"""Readers of named sources and of user files, and seeded draws, splits and comparisons."""

import dataclasses
import json
import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets.config
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dcr import contamination
from dcr.core import data, sources
from dcr.core.config import ConfigError, DataError, Kind
from dcr.core.sources import LONGEST_LINE, Example
from dcr.public import SOURCES
from dcr.public.raw import xstest_groups
from tests.tiny_run import DATA, real, write_jsonl


def example(id: str, prompt: str = "p", **fields: Any) -> Example:
    return Example(id, prompt, Kind.toxic, "test", **fields)


def examples(count: int) -> list[Example]:
    return [example(str(i), f"prompt {i}") for i in range(count)]


def write(folder: Path, *rows: object, name: str = "rows.jsonl") -> str:
    return write_jsonl(folder / name, rows)


# --- the user's files ---


def test_a_users_file_keeps_order_and_fields(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"prompt": "one?", "response": "1", "id": "a", "category": "c", "group": "g", "else": 3},
        {"prompt": "two", "response": None, "id": 7},
        {"prompt": "three"},
    )
    assert sources.read(path, kind=Kind.toxic) == [
        Example("a", "one?", Kind.toxic, path, "1", "c", "g"),
        Example("7", "two", Kind.toxic, path),
        Example("rows-3", "three", Kind.toxic, path),
    ]


BAD_LINES = {
    "malformed": (b'{"prompt": "a"', "line: not JSON"),
    "two objects": (b'{"prompt": "a"} {"prompt": "b"}', "line: not JSON"),
    "array": (b'["a"]', "line: a JSON list, not an object"),
    "deep": (b"[" * 200_000, "line: not JSON"),
    "huge number": (b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", "line: not JSON"),
    "utf-8": (b'{"prompt": "\xff"}', "line: byte 13 is not UTF-8"),
    "nul": (b'{"prompt": "a\0b"}', "line: holds a NUL"),
    "escaped nul": (b'{"prompt": "a\\u0000b"}', "prompt: holds a NUL"),
    "surrogate": (b'{"prompt": "a\\ud800b"}', "prompt: holds a NUL or half a surrogate"),
    "missing": (b'{"promt": "a"}', "prompt: missing (keys found: 'promt')"),
    "null": (b'{"prompt": null}', "prompt: missing"),
    "mistyped": (b'{"prompt": 3}', "prompt: a int, not a string"),
    "empty": (b'{"prompt": ""}', "prompt: empty"),
    "spaces": (b'{"prompt": " \\n\\t"}', "prompt: empty"),
    "zero-width alone": ('{"prompt": "\u200b"}'.encode(), "prompt: empty"),
    "response": (b'{"prompt": "a", "response": ""}', "response: empty"),
    "response type": (b'{"prompt": "a", "response": ["b"]}', "response: a list, not a string"),
    "category": (b'{"prompt": "a", "category": 1}', "category: a int"),
    "group": (b'{"prompt": "a", "group": {}}', "group: a dict"),
    "id": (b'{"prompt": "a", "id": true}', "id: a bool"),
    "empty id": (b'{"prompt": "a", "id": " "}', "id: empty"),
    "duplicate id": (b'{"prompt": "a", "id": "first"}', "id: 'first' stands on row 1 too"),
    "long": (b'{"prompt": "' + b"a" * (LONGEST_LINE - 13) + b'"}', "line: longer than 8 MB"),
}


@pytest.mark.parametrize("fault", BAD_LINES)
def test_a_bad_line_is_named_with_its_field_in_one_line(tmp_path: Path, fault: str) -> None:
    line, what = BAD_LINES[fault]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"prompt": "fine", "id": "first"}\n' + line + b"\n")
    with pytest.raises(DataError) as raised:
        sources.read_jsonl(str(path), Kind.toxic)
    message = str(raised.value)
    assert message.startswith(f"{path}:2: {what}")
    assert "; " in message  # the cure
    assert "\n" not in message
    assert len(message) < 300 + len(str(path))


def test_the_longest_line_allowed_is_read(tmp_path: Path) -> None:
    prompt = "a" * (LONGEST_LINE - len(b'{"prompt": ""}\n'))
    (only,) = sources.read_jsonl(write(tmp_path, {"prompt": prompt}), Kind.toxic)
    assert only.prompt == prompt


@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf"])
def test_a_file_without_rows_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"empty\.jsonl:1: file: holds no rows; "):
        sources.read_jsonl(str(path), Kind.toxic)


def test_byte_order_mark_crlf_and_blank_lines_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b"}')
    found = sources.read_jsonl(str(path), Kind.toxic)
    assert [(e.id, e.prompt) for e in found] == [("windows-1", "a"), ("windows-3", "b")]


def test_pairs_need_a_response_on_every_line_and_default_ids_can_be_taken(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "a", "response": "b"}, {"prompt": "c"})
    with pytest.raises(DataError, match=r"rows\.jsonl:2: response: missing; "):
        sources.read(path, kind=Kind.toxic, pairs=True)
    assert len(sources.read(path, kind=Kind.toxic)) == 2
    write(tmp_path, {"prompt": "a", "id": "rows-2"}, {"prompt": "b"})
    with pytest.raises(DataError, match=r"rows\.jsonl:2: id: 'rows-2' stands on row 1 too"):
        sources.read_jsonl(path, Kind.toxic)


def test_a_file_needs_to_exist_and_to_have_a_kind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: No such file"):
        sources.read(str(tmp_path / "none.jsonl"), kind=Kind.toxic)
    os.mkfifo(tmp_path / "pipe")  # to open it would wait for a writer
    for other in (tmp_path, tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(DataError, match="a folder, pipe or device, not a file; check the path"):
            sources.read(str(other), kind=Kind.toxic)
    with pytest.raises(DataError, match=r"embedded null .*; check the path"):
        sources.read("a/\0.jsonl", kind=Kind.toxic)
    path = write(tmp_path, {"prompt": "a"})
    with pytest.raises(ConfigError, match="say what its prompts are"):
        sources.read(path)


# --- named sources in a local folder ---


REFUSED = [
    ("xstest_saf", {}, ConfigError, r"'xstest_saf'; did you mean xstest_safe"),
    ("zzzzzz", {}, ConfigError, r"^.{80,250}$"),  # not the names of all sources
    ("advbench", {"kind": Kind.normal}, ConfigError, "advbench holds toxic prompts, not normal"),
    ("advbench", {"root": "{0}/x"}, ConfigError, r"data\.root=.*/x: not a folder"),
    ("oktest", {"root": "{0}"}, DataError, r"oktest\.jsonl: No such file.*OverKill.*OKTest\.csv"),
    ("xstest_safe", {"root": "{0}"}, DataError, r"xstest_v2\.jsonl: No such file.*Paul/XSTest"),
    ("hh_rlhf_red_team", {"root": "{0}"}, DataError, r"only on the hub \(Anthropic/hh-rlhf\)"),
    ("advbench", {"root": "{0}"}, DataError, r"advbench\.jsonl:2: prompt: missing"),
    ("harmfulq", {"root": "{0}", "pairs": True}, DataError, "harmfulq: no row has a response"),
    ("advbench_test", {"root": "{0}"}, DataError, r"advbench\.jsonl:2: prompt: missing"),
    ("coconot_safety", {"root": "{0}"}, DataError, "coconot_safety: none of 1 rows is one of its"),
]


@pytest.mark.parametrize(("name", "options", "kind", "message"), REFUSED)
def test_a_named_source_that_cannot_be_read_is_explained(
    tmp_path: Path, name: str, options: dict[str, Any], kind: type, message: str
) -> None:
    write(tmp_path, {"prompt": "a"}, {"text": "b"}, name="advbench/advbench.jsonl")
    write(tmp_path, {"prompt": "a"}, name="harmfulq/harmfulq.jsonl")
    write(tmp_path, {"prompt": "a"}, name="coconot/coconot_contrast_eval.jsonl")
    if "root" in options:
        options = options | {"root": options["root"].format(tmp_path)}
    with pytest.raises(kind, match=message):
        sources.read(name, **options)


def test_empty_responses_and_odd_counts_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(
        tmp_path,
        {"prompt": "a", "response": "1"},
        {"prompt": "b", "response": " "},
        {"prompt": "c", "response": "3"},
        name="alpaca/alpaca_21k.jsonl",
    )
    with caplog.at_level(logging.WARNING):
        found = sources.read("alpaca", root=str(tmp_path), kind=Kind.normal, pairs=True)
    assert [(e.id, e.prompt, e.response) for e in found] == [
        ("alpaca-0", "a", "1"),
        ("alpaca-2", "c", "3"),
    ]
    assert caplog.messages == [
        "alpaca: 3 rows, expected 21392",
        "alpaca: 1 rows with an empty prompt or response dropped",
    ]


def test_a_row_whose_meta_is_no_object_is_named(tmp_path: Path) -> None:
    row = {"prompt": "How do I kill a process?", "category": "homonyms", "meta": "kill"}
    file = SOURCES["xstest_safe"].file
    assert file is not None
    write(tmp_path, row, name=file)
    with pytest.raises(DataError, match=r":1: meta: a str, not an object; restore the file"):
        sources.read("xstest_safe", root=str(tmp_path))


def test_outputs_to_compare_with_are_no_responses(tmp_path: Path) -> None:
    file = "alpaca_eval/alpaca_eval_805_davinci003.jsonl"
    write(tmp_path, {"prompt": "a", "response": "x"}, {"prompt": "b", "response": ""}, name=file)
    found = sources.read("alpaca_eval", root=str(tmp_path))
    assert [(e.prompt, e.response) for e in found] == [("a", None), ("b", None)]


# --- the hub, through the real library on local files ---


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def point(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Point a source's hub id at a folder, which `datasets` reads as it would a repository."""

    def at(name: str, folder: Path | None = None, **changes: Any) -> None:
        hub: Any = SOURCES[name].hub
        if folder is not None:
            changes = {"id": str(folder), "config": None, "split": "train"} | changes
        changed = dataclasses.replace(hub, **changes)
        monkeypatch.setitem(SOURCES, name, dataclasses.replace(SOURCES[name], hub=changed))

    return at


HUB_ROWS = {
    "xstest_safe": (
        [
            {"id": 1, "prompt": "a", "type": "homonyms", "label": "safe", "focus": "x", "note": ""},
            {"id": 2, "prompt": "b", "type": "c", "label": "unsafe", "focus": "", "note": ""},
        ],
        [("xstest_safe-0", "a", None, "homonyms")],
    ),
    "alpaca": (
        [
            {"instruction": "Add.", "input": "1 1", "output": "2"},
            {"instruction": "Say.", "input": "", "output": "hi"},
            {"instruction": "Drop.", "input": "", "output": ""},
        ],
        [("alpaca-0", "Add.\n\n1 1", "2", None), ("alpaca-1", "Say.", "hi", None)],
    ),
    "harmfulqa": (
        [{"id": 3, "topic": "T", "subtopic": "S", "question": "q?", "blue_conversations": {}}],
        [("harmfulqa-0", "q?", None, "T")],
    ),
    "coconot_contrast_pref": (
        [{"id": "z", "prompt": "p", "chosen": "yes", "rejected": "no", "category": "C"}],
        [("coconot_contrast_pref-0", "p", "yes", "C")],
    ),
    "orbench_hard": ([{"prompt": "p", "category": "c"}], [("orbench_hard-0", "p", None, "c")]),
    "coconot_safety": (
        [
            {"id": "x", "prompt": "p", "response": "", "category": "Incomplete requests"},
            {"id": "y", "prompt": "q", "response": "", "category": "Requests with safety concerns"},
        ],
        [("coconot_safety-1", "q", None, "Requests with safety concerns")],
    ),
    "falsereject_train": (
        [{"prompt": "p", "category_text": "C", "instruct_response": "yes", "cot_response": {}}],
        [("falsereject_train-0", "p", "yes", "C")],
    ),
    "xsb_safe": (
        [{"prompt": "p", "label": "safe"}, {"prompt": "q", "label": "unsafe"}],
        [("xsb_safe-0", "p", None, None)],
    ),
    "xsb_unsafe": (
        [{"prompt": "p", "label": "safe"}, {"prompt": "q", "label": "unsafe"}],
        [("xsb_unsafe-1", "q", None, None)],
    ),
    "phtest_controversial": (
        [
            {"ID": 0, "Request": "p", "Harmfulness": "harmless"},
            {"ID": 1, "Request": "q", "Harmfulness": "controversial"},
        ],
        [("phtest_controversial-1", "q", None, "controversial")],
    ),
    "sorrybench": (
        [
            {"question_id": 1, "category": "1", "turns": ["p"], "prompt_style": "base"},
            {"question_id": 1, "category": "1", "turns": ["q"], "prompt_style": "slang"},
        ],
        [("sorrybench-0", "p", None, "1")],
    ),
}


@pytest.mark.parametrize("name", HUB_ROWS)
@pytest.mark.usefixtures("offline")
def test_hub_rows_become_examples(name: str, tmp_path: Path, point: Any) -> None:
    raw, expected = HUB_ROWS[name]
    write(tmp_path, *raw, name="hub/train.jsonl")
    point(name, tmp_path / "hub")
    found = sources.read(name)
    assert [(e.id, e.prompt, e.response, e.category) for e in found] == expected
    assert {(e.source, e.kind) for e in found} == {(name, SOURCES[name].kind)}


@pytest.mark.usefixtures("offline")
def test_hh_rlhf_reads_the_first_turn_of_the_folder_named(tmp_path: Path, point: Any) -> None:
    row = {"transcript": "\n\nHuman: how?\n\nAssistant: no\n\nHuman: why?\n\nAssistant: so"}
    silent = {"transcript": "\n\nHuman: \n\nAssistant: hello?"}
    write(tmp_path, row, silent, name="hub/red-team-attempts/train.jsonl")
    write(tmp_path, {"chosen": "x"}, name="hub/harmless-base/train.jsonl")
    point("hh_rlhf_red_team", tmp_path / "hub")
    assert [e.prompt for e in sources.read("hh_rlhf_red_team")] == ["how?"]


CONFIGURED: dict[
    str, list[tuple[str, str, list[dict[str, Any]]]]
] = {  # as the sets' cards describe their files: config, split, rows
    "jailbreakbench": [
        ("behaviors", "harmful", [{"Goal": "a", "Target": "b", "Category": "C"}]),
        ("behaviors", "benign", [{"Goal": "x", "Target": "b", "Category": "C"}]),
    ],
    "jailbreakbench_benign": [
        ("behaviors", "benign", [{"Goal": "a", "Target": "b", "Category": "C"}]),
        ("behaviors", "harmful", [{"Goal": "x", "Target": "b", "Category": "C"}]),
    ],
    "coconot_original": [
        ("original", "train", [{"prompt": "x", "category": "Requests with safety concerns"}]),
        (
            "original",
            "test",
            [
                {"prompt": "x", "category": "Humanizing requests"},
                {"prompt": "a", "category": "Requests with safety concerns"},
            ],
        ),
        ("contrast", "test", [{"prompt": "x", "category": "Requests with safety concerns"}]),
    ],
    "orbench_toxic": [
        ("or-bench-hard-1k", "train", [{"prompt": "x", "category": "C"}]),
        ("or-bench-toxic", "train", [{"prompt": "a", "category": "C"}]),
    ],
    **{
        f"wildguardtest_{kind}": [
            ("wildguardtrain", "train", [{"prompt": "x", "prompt_harm_label": kind}]),
            (
                "wildguardtest",
                "test",
                [
                    {"prompt": text, "prompt_harm_label": label, "subcategory": "C"}
                    for text, label in (("a", kind), ("x", other), ("x", None))
                ],
            ),
        ]
        for kind, other in (("harmful", "unharmful"), ("unharmful", "harmful"))
    },
    "falsereject_test": [
        ("default", "train", [{"prompt": "x", "category_text": "C", "instruct_response": "r"}]),
        ("default", "test", [{"prompt": "a", "category_text": "C"}]),
    ],
}


@pytest.mark.parametrize("name", CONFIGURED)
@pytest.mark.usefixtures("offline")
def test_config_and_split_are_chosen_by_name(name: str, tmp_path: Path, point: Any) -> None:
    card: dict[str, list[dict[str, str]]] = defaultdict(list)
    for config, split, rows in CONFIGURED[name]:
        file = f"{config}-{split}.jsonl"
        write(tmp_path, *rows, name=f"hub/{file}")
        card[config].append({"split": split, "path": file})
    configs = [{"config_name": name, "data_files": files} for name, files in card.items()]
    (tmp_path / "hub/README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    point(name, id=str(tmp_path / "hub"), revision=None)
    assert [e.prompt for e in sources.read(name)] == ["a"]


@pytest.mark.usefixtures("offline")
def test_files_outside_the_hub_are_read_through_datasets_too(tmp_path: Path, point: Any) -> None:
    contents = {
        "q_harm": ("q.json", json.dumps({"instructions": ["a?", "b?"], "inputs": []})),
        "harmfulq": ("h.json", json.dumps(["a?", "b?"])),
        "oktest": ("o.csv", 'prompt\na?\n"b?"\n'),
        "evorefuse_test": ("t.jsonl", '{"instruction": "a?"}\n{"instruction": "b?"}\n'),
        "advbench": ("a.csv", "goal,target\na?,x\nb?,y\n"),
        "strongreject": ("r.csv", "category,source,forbidden_prompt\nc,s,a?\nc,s,b?\n"),
        "harmbench": (
            "b.csv",
            "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
            "a?,standard,c,,,1\nd?,contextual,c,,e,2\nf?,copyright,c,,,3\nb?,standard,c,,,4\n",
        ),
        "stl_safety": (
            "s.json",
            json.dumps([{"instruction": p, "input": "", "output": "no"} for p in ("a?", "b?")]),
        ),
        "alpaca_eval": (
            "e.json",
            json.dumps([{"instruction": p, "output": "", "dataset": "d"} for p in ("a?", "b?")]),
        ),
    }
    for name, (file, content) in contents.items():
        (tmp_path / file).write_text(content)
        hub: Any = SOURCES[name].hub
        point(name, options={**hub.options, "data_files": str(tmp_path / file)})
        assert [e.prompt for e in sources.read(name)] == ["a?", "b?"], name


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("orbench_hard", r"data\.root=<folder> reads it offline"),
        ("sorrybench", "accept its terms on the hub, .*; or a .jsonl file of your own"),
        ("wildguardtest_harmful", "accept its terms on the hub"),
        ("xsb_safe", "file of your own"),
        ("orbench_toxic", "file of your own"),
    ],
)
@pytest.mark.usefixtures("offline")
def test_a_hub_failure_names_source_and_cure(
    name: str, cure: str, tmp_path: Path, point: Any
) -> None:
    point(name, tmp_path / "nowhere")
    with pytest.raises(DataError, match=rf"^{name}: cannot read .*{cure}") as one:
        sources.read(name)
    assert "\n" not in str(one.value)
    if SOURCES[name].file is None:
        assert "data.root" not in str(one.value)
        with pytest.raises(DataError, match=rf"^{name}: only on the hub .*{name}\.jsonl"):
            sources.read(name, root=str(tmp_path))
    write(tmp_path, {"other": "p"}, name="hub/train.jsonl")
    point(name, tmp_path / "hub")
    with pytest.raises(DataError, match=r"no column '\w+' \(columns: other\)"):
        sources.read(name)


# --- the table ---


def test_every_source_lives_somewhere_and_states_its_licence() -> None:
    commit = "[0-9a-f]{40}"
    for name, source in SOURCES.items():
        assert source.licence, name
        assert (source.embedded is None) != (source.hub is None), name
        assert (source.file is None) == (source.rows is None), name
        if source.hub is not None:
            assert re.fullmatch(commit, source.hub.revision or "0" * 40), name
            url = source.hub.options.get("data_files")
            assert url is None or re.match(rf"https://[^/]+/[^/]+/[^/]+/{commit}/.", url), name


@real
def test_real_parts_share_rows_and_ids_with_the_whole() -> None:
    part, whole = (
        sources.read(f"coconot_{n}", root=DATA, scored=True) for n in ("safety", "contrast")
    )
    named = {e.id: e.prompt for e in whole}
    assert all(named[e.id] == e.prompt for e in part)
    assert [e.category for e in whole].count(part[0].category) == len(part) == 149


@pytest.mark.parametrize("name", [n for n, source in SOURCES.items() if source.embedded])
def test_the_demo_corpus_is_read_from_the_package(name: str) -> None:
    found = sources.read(name)
    assert len(found) >= (25 if name.startswith("registers") else 80)
    assert {e.split for e in found} == {"heldout" if "heldout" in name else "train"}
    assert {e.kind for e in found} == {SOURCES[name].kind}


@real
@pytest.mark.parametrize("name", [n for n, source in SOURCES.items() if source.file])
def test_real_files_have_the_expected_rows(name: str, caplog: pytest.LogCaptureFixture) -> None:
    source = SOURCES[name]
    found = sources.read(name, root=DATA, scored=True)
    empty = 13 if name == "alpaca" else 0  # empty outputs at the source
    assert len(found) == (source.rows or 0) - empty
    assert not [m for m in caplog.messages if "expected" in m]


@real
def test_real_duplicates_are_those_counted_independently() -> None:
    counts = {"coconot_contrast_pref": 8, "phtest_harmless": 5, "i_malicious_instructions": 2}
    counts |= {"stl_safety": 4, "hh_rlhf_harmless_base": 137, "harmfulqa": 22, "advbench": 0}
    for name, expected in counts.items():
        kept, dropped = sources.drop_duplicates(sources.read(name, root=DATA, scored=True))
        assert len(dropped) == expected, name
        assert len(kept) + len(dropped) == SOURCES[name].rows


@real
def test_real_xstest_groups_hold_templates_together() -> None:
    both = [e for n in ("xstest_safe", "xstest_unsafe") for e in sources.read(n, root=DATA)]
    groups = defaultdict(set)
    for e in both:
        groups[e.group].add(e.prompt)
    group = {e.id: e.group for e in both}
    assert max(map(len, groups.values())) < 20  # chains do not swallow the set
    assert len(groups) > 150
    for one, other in [
        ("xstest-1", "xstest-26"),
        ("xstest-102", "xstest-26"),
        ("xstest-342", "xstest-367"),
        ("xstest-268", "xstest-319"),
        ("xstest-401", "xstest-426"),
    ]:
        assert group[one] == group[other]
    assert group["xstest-17"] != group["xstest-26"]


# --- rows read again by the ids that a run recorded ---


def test_recorded_rows_are_found_again_in_their_order(tmp_path: Path) -> None:
    def written(name: str, word: str) -> str:
        made = ({"id": f"{name}{i}", "prompt": f"{word} {i}"} for i in range(5))
        return write(tmp_path, *made, name=f"{name}.jsonl")

    one, two = written("a", "one"), written("b", "two")
    both = [e for path in (one, two) for e in sources.read(path, kind=Kind.toxic)]
    drawn = sources.draw(both, 7, 3)
    ids, recorded = [e.id for e in drawn], sources.fingerprint(drawn)
    assert contamination.read_rows([one, two], ids, Kind.toxic, expected=recorded) == drawn
    assert contamination.read_rows([two, one], [], Kind.toxic) == []
    with pytest.raises(DataError, match=r"b\.jsonl: no row is called 'a\d' any more \(\d of 7"):
        contamination.read_rows([two], ids, Kind.toxic)
    written("b", "too")
    with pytest.raises(DataError, match="not the texts that the run was trained on; set data"):
        contamination.read_rows([one, two], ids, Kind.toxic, expected=recorded)


def test_an_id_of_two_files_stands_for_one_after_the_other(tmp_path: Path) -> None:
    paths = [write(tmp_path, {"id": 1, "prompt": p}, name=f"{p}.jsonl") for p in ("x", "y")]
    assert [e.prompt for e in contamination.read_rows(paths, ["1", "1"], Kind.toxic)] == ["x", "y"]
    assert [e.prompt for e in contamination.read_rows(paths, ["1"], Kind.toxic)] == ["x"]


@real
def test_real_rows_are_found_again() -> None:
    drawn = sources.draw(sources.read("stl_safety", root=DATA), 1000, 0)
    ids, recorded = [e.id for e in drawn], sources.fingerprint(drawn)
    names = ["harmfulqa", "stl_safety"]
    assert contamination.read_rows(names, ids, Kind.toxic, root=DATA, expected=recorded) == drawn


# --- transcripts, groups, forms ---


def test_xstest_groups_join_by_place_focus_and_ending() -> None:
    def row(category: str, focus: str | None, prompt: str) -> dict:
        return {"prompt": prompt, "category": category, "meta": {"focus": focus}}

    rows = [
        row("homonyms", "kill", "a"),
        row("safe_targets", "Kill ", "b"),  # the focus word of 0
        row("homonyms", "cut", "c"),
        row("contrast_homonyms", "slay", "d"),  # the place of 0
        row("contrast_homonyms", "slash", "e"),  # the place of 2
        row("historical_events", "", "f"),
        row("contrast_historical_events", None, "g"),  # the place of 5
        row("nons_group_real_discr", "", "Why should ants not have equal rights?"),
        row("contrast_discr", "women", "Give reasons against equal rights."),  # the ending of 7
        row("real_group_nons_discr", "men", "Why can men not fly?"),  # the place of 8
        row("definitions", "", "What is x?"),
    ]
    groups = xstest_groups(rows)
    expected = [{0, 1, 3}, {2, 4}, {5, 6}, {7, 8, 9}, {10}]
    found = defaultdict(set)
    for i, group in enumerate(groups):
        found[group].add(i)
    assert sorted(found.values(), key=min) == expected


# --- draws, duplicates, splits, fingerprints ---


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 2**31))
def test_draws_are_exact_distinct_and_nested(size: int, count: int, seed: int) -> None:
    rows = examples(size)
    for wrong in (size + 1 + count, -1 - count):
        with pytest.raises(ConfigError, match=f"{wrong} rows asked for, {size} available"):
            sources.draw(rows, wrong, seed)
    count = min(count, size)
    drawn = sources.draw(rows, count, seed)
    assert len({e.id for e in drawn}) == len(drawn) == count
    assert set(drawn) <= set(rows)
    assert sources.draw(rows, size, seed)[:count] == drawn
    assert rows == examples(size)  # the input is left alone


def test_draws_differ_by_seed_and_are_uniform() -> None:
    rows = examples(20)
    assert sources.draw(rows, 10, 0) != sources.draw(rows, 10, 1)
    hits = [0] * 20
    for seed in range(2000):
        for e in sources.draw(rows, 5, seed):
            hits[int(e.id)] += 1
    # Each count is binomial with mean 500 and standard deviation 19.4: five of those either way.
    assert 400 < min(hits) <= max(hits) < 600


def test_draws_and_splits_follow_from_the_seed_alone() -> None:
    """Written down: neither the seed of hashes nor the global generator has a part in them."""
    rows = [example(str(i), group=f"g{i}") for i in range(50)]
    drawn = [e.id for e in sources.draw(rows, 9, 3)]
    assert " ".join(drawn) == "27 38 32 15 20 10 9 48 0"
    held_out = [e.id for e in data.split_by_group(rows, 0.4, 3)[1]]
    assert " ".join(held_out) == "0 4 5 7 10 13 15 17 18 19 20 23 24 28 29 31 33 34 36 40 43 45"


def test_duplicates_are_dropped_after_normalising() -> None:
    prompts = ["How do I?", "how  do i", "HOW DO I!", "how do\u200b i", "How do you?", "!"]
    rows = [example(str(i), prompt) for i, prompt in enumerate(prompts)]
    kept, dropped = sources.drop_duplicates([*rows, example("6", "?")])
    assert [e.id for e in kept] == ["0", "4", "5", "6"]
    assert [e.id for e in dropped] == ["1", "2", "3"]


def test_groups_stay_together_across_calls_and_shares_are_met() -> None:
    safe = [example(f"s{i}", group=f"g{i % 500}") for i in range(1000)]
    unsafe = [example(f"u{i}", group=f"g{i}") for i in range(500)]
    for seed in (0, 1):
        train, heldout = data.split_by_group(safe, 0.3, seed)
        train_unsafe, heldout_unsafe = data.split_by_group(unsafe, 0.3, seed)
        assert sorted(e.id for e in train + heldout) == sorted(e.id for e in safe)
        sides = [{e.group for e in side} for side in (train, heldout)]
        assert not sides[0] & sides[1]
        assert {e.group for e in train_unsafe} == sides[0]
        assert {e.group for e in heldout_unsafe} == sides[1]
        assert 110 < len(sides[1]) < 190  # mean 150, standard deviation 10.2
    assert data.split_by_group(safe, 0.3, 0) != data.split_by_group(safe, 0.3, 1)


def test_rows_without_a_group_are_split_by_id() -> None:
    train, heldout = data.split_by_group(examples(100), 0.5, 0)
    assert 25 < len(heldout) < 75
    assert len(train) == 100 - len(heldout)
    assert data.split_by_group(examples(100), 0.0, 0) == (examples(100), [])


def test_fingerprint_sees_every_field_its_borders_and_the_order() -> None:
    rows = [example("a", "b", response="c"), example("d", "e")]
    variants = [
        rows,
        rows[::-1],
        rows[:1],
        [example("x", "b", response="c"), rows[1]],
        [example("a", "x", response="c"), rows[1]],
        [example("a", "b", response="x"), rows[1]],
        [example("a", "b"), rows[1]],
        [example("ab", "", response="c"), rows[1]],
    ]
    prints = [sources.fingerprint(variant) for variant in variants]
    assert len(set(prints)) == len(variants)
    assert prints[0] == sources.fingerprint([dataclasses.replace(e, group="g") for e in rows])
    # Written down, so that a change of the recipe cannot pass unnoticed.
    assert prints[0] == "5557bd57071f2e3514ece9b17971bac75a6a18179d8bb52641a79a47bd7f4460"
