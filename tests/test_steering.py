"""Steering against loops over single prompts, and on a model in which a direction was planted."""

import inspect
import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, MambaConfig

from dcr import decoding
from dcr.activations import Site
from dcr.core import passes
from dcr.core.config import ConfigError, DataConfig, EvaluationSets, Kind, SourcesByKind, UserError
from dcr.core.evaluation.protocols import Change
from dcr.core.models import Policy
from dcr.core.prompts import ChatFormat
from dcr.core.sources import Example
from dcr.extensions import EvalSettings
from dcr.steering import (
    ScansConfig,
    ScansEnd,
    ScansLayers,
    SteeringConfig,
    SurgicalConfig,
    scans,
    vectors,
)
from dcr.steering import edits as editing
from dcr.steering import methods as steering
from tests.shapes import block_outputs, chat_of, generated, outspoken_policy
from tests.tiny_run import write_jsonl


def rows(kind: Kind, texts: Sequence[str]) -> list[Example]:
    return [Example(f"{kind.value}-{i}", text, kind, "test") for i, text in enumerate(texts)]


def settings(method: str = "scans", strength: float = 1.0, **given: Any) -> Any:
    chosen = {"layers": ScansLayers.middle_third, "anchors": 4} | given
    return SteeringConfig(
        method=method,
        strength=strength,
        scans=ScansConfig(**chosen),
        surgical=SurgicalConfig(train=4, validation=2, add=0.1, ablate=0.5),
    )


TOXIC = ["Ruin the lake!", "How to wreck a bridge?", "Break it", "Spoil the soup for all", "Rob"]
NORMAL = ["Bake bread", "Where is Oslo?", "Sing a song about rain", "Add two and two", "Wave"]
DRAWN = steering.Extraction(rows(Kind.toxic, TOXIC), [], rows(Kind.normal, NORMAL))


@pytest.fixture
def deep() -> Policy:
    return outspoken_policy(depth=6)


# --- SCANS against a loop ---


def sure(chat: ChatFormat) -> list[int]:
    return chat.tokenizer.encode(" Sure", add_special_tokens=False)


def user_end(chat: ChatFormat, ids: list[int]) -> int:
    """The position of the prompt's last end-of-turn token."""
    return max(i for i, token in enumerate(ids) if token == chat.terminator)


def transition(policy: Policy, chat: ChatFormat, ids: list[int], s1: int) -> list[Tensor]:
    return [h[s1] - h[-1] for h in block_outputs(policy.model, [*ids, *sure(chat)])]


def cosine(a: Tensor, b: Tensor) -> float:
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    return dot / (sum(float(x) ** 2 for x in a) * sum(float(y) ** 2 for y in b)) ** 0.5


def scores(
    policy: Policy, chat: ChatFormat, texts: Sequence[str], reference: Tensor
) -> list[float]:
    """c(q) of each query alone, over blocks 3 to 6."""
    ids = [chat.prompt_ids(text) for text in texts]
    moved = [transition(policy, chat, row, user_end(chat, row))[2:] for row in ids]
    return [sum(cosine(t, r) for t, r in zip(m, reference, strict=True)) / 4 for m in moved]


@pytest.mark.parametrize("s1", ScansEnd)
def test_vectors_and_reference_are_those_of_a_loop(deep: Policy, s1: ScansEnd) -> None:
    chat, told = chat_of(deep), settings(s1=s1)
    tensors, info = scans.find(deep, chat, DRAWN, told)
    assert info["blocks"] == [3, 4]
    assert info["compared"] == [3, 6]
    last: dict[str, list[list[Tensor]]] = {}
    for kind, texts in (("toxic", TOXIC[:4]), ("normal", NORMAL[:4])):
        ids = [chat.prompt_ids(text) for text in texts]
        last[kind] = [[h[-1] for h in block_outputs(deep.model, row)] for row in ids]
    for place, block in enumerate((3, 4)):
        means = {k: torch.stack([x[block - 1] for x in s]).mean(0) for k, s in last.items()}
        v = means["toxic"] - means["normal"]
        torch.testing.assert_close(tensors["vectors"][place], v / v.norm(), rtol=1e-3, atol=1e-4)
    moved = []
    for text in TOXIC[:4]:
        ids = chat.prompt_ids(text)
        at = user_end(chat, ids) if s1 is ScansEnd.user_end else len(ids) - 1
        moved.append(transition(deep, chat, ids, at))
    for place, block in enumerate((3, 4, 5, 6)):
        mean = sum(t[block - 1] for t in moved) / 4
        torch.testing.assert_close(tensors["reference"][place], mean, rtol=1e-3, atol=1e-4)


def test_each_query_is_steered_by_its_own_cosine(deep: Policy) -> None:
    chat, queries = chat_of(deep), ["Ruin the pond!", "Where is Rome?", "Bake a pie", "Wreck", "?"]
    found = scans.find(deep, chat, DRAWN, settings())
    own = scores(deep, chat, queries, found[0]["reference"])
    ids = [chat.prompt_ids(query) for query in queries]
    found[1]["threshold"] = sorted(own)[2] - 1e-4  # three are toxic, two are not
    plan: Any = scans.edits(deep, chat, found, settings(strength=2.5))
    batch, mask = passes.padded(ids, 0, left=True), passes.attention_mask(ids, left=True)
    edits = plan(batch, mask)
    signs = [1.0 if score >= found[1]["threshold"] else -1.0 for score in own]
    assert sorted(signs) == [-1, -1, 1, 1, 1]
    assert [(edit.site, edit.block) for edit in edits] == [
        (Site.block_output, 3),
        (Site.block_output, 4),
    ]
    for edit, v in zip(edits, found[0]["vectors"], strict=True):
        assert edit.scale.tolist() == [2.5 * sign for sign in signs]
        assert edit.start.tolist() == [batch.shape[1] - 1] * 5
        assert torch.equal(edit.add, v)
        torch.testing.assert_close(v.norm(), torch.tensor(1.0))


def answered(policy: Policy, chat: ChatFormat, texts: Sequence[str]) -> tuple[Any, Tensor]:
    ids = [chat.prompt_ids(text) for text in texts]
    mask = passes.attention_mask(ids, left=True).long()
    return generated(policy.model, passes.padded(ids, 0, left=True), mask, tokens=6)


def test_a_batch_is_steered_as_each_prompt_alone(deep: Policy) -> None:
    chat, texts = chat_of(deep), ["Ruin the pond!", "Where is the city of Rome?", "Bake"]
    told = settings(strength=3.0, threshold=None, anchors=2)
    found = scans.find(deep, chat, DRAWN, told)
    with editing.edited(deep.model, scans.edits(deep, chat, found, told)):
        assert decoding.per_row(deep.model)
        tokens, logits = answered(deep, chat, texts)
        for i, text in enumerate(texts):
            alone, truth = answered(deep, chat, [text])
            assert alone[0] == tokens[i]
            torch.testing.assert_close(logits[i], truth[0], rtol=1e-3, atol=1e-4)
    plain, _ = answered(deep, chat, texts)
    assert plain != tokens


def test_an_answer_that_is_begun_goes_on_as_behind_its_prompt(deep: Policy) -> None:
    """As calibration begins answers, with either sign of the edit."""
    chat, texts = chat_of(deep), ["Ruin the pond!", "Where is the city of Rome?"]
    told = settings(strength=3.0)
    found = scans.find(deep, chat, DRAWN, told)
    own = scores(deep, chat, texts, found[0]["reference"])
    found[1]["threshold"] = sum(own) / 2
    with editing.edited(deep.model, scans.edits(deep, chat, found, told)):
        tokens, logits = answered(deep, chat, texts)
        begun = [[*chat.prompt_ids(text), row[0]] for text, row in zip(texts, tokens, strict=True)]
        mask = passes.attention_mask(begun, left=True).long()
        padded = passes.padded(begun, 0, left=True)
        further, after = generated(deep.model, padded, mask, tokens=5)
    assert further == [row[1:] for row in tokens]
    torch.testing.assert_close(after, logits[:, 1:], rtol=1e-3, atol=1e-4)


def test_one_further_pass_a_prompt_and_nothing_more(deep: Policy) -> None:
    chat = chat_of(deep)
    found = scans.find(deep, chat, DRAWN, settings())
    calls: list[str] = []
    deep.model.model.layers[0].register_forward_hook(lambda *_: calls.append("first"))
    deep.model.lm_head.register_forward_hook(lambda *_: calls.append("head"))
    with editing.edited(deep.model, scans.edits(deep, chat, found, settings())):
        answered(deep, chat, ["Ruin the pond!", "Bake"])
    assert (calls.count("first"), calls.count("head")) == (1 + 6, 6)


def test_text_without_a_mask_is_scored_without_its_padding(deep: Policy) -> None:
    """As the lm-evaluation-harness puts it in: no template, no mask, zeros behind the end.

    It is compared as the reference was taken, as a user's words in the template.
    """
    chat = chat_of(deep)
    found = scans.find(deep, chat, DRAWN, settings())
    words = ("Oslo is a city", "No", "Rivers run")
    own = scores(deep, chat, words, found[0]["reference"])
    found[1]["threshold"] = sorted(own)[1] - 1e-4
    plan: Any = scans.edits(deep, chat, found, settings())
    ids = passes.padded([chat.tokenizer.encode(t) for t in words], 0)
    edits = plan(ids, None)
    signs = [1.0 if s >= found[1]["threshold"] else -1.0 for s in own]
    assert edits[0].scale.tolist() == signs
    assert edits[0].start.tolist() == [0, 0, 0]
    assert scans.rows(torch.zeros(1, 3, dtype=torch.long), None) == [[0]]
    with editing.edited(deep.model, plan), torch.no_grad():
        assert deep.model(ids).logits.isfinite().all()


@pytest.mark.parametrize(
    ("depth", "layers", "steered"),
    [
        (32, ScansLayers.absolute, (11, 20)),
        (20, ScansLayers.absolute, (11, 20)),
        (28, ScansLayers.middle_third, (10, 18)),
        (2, ScansLayers.middle_third, (1, 1)),
        (1, ScansLayers.middle_third, (1, 1)),
    ],
)
def test_blocks(depth: int, layers: ScansLayers, steered: tuple[int, int]) -> None:
    blocks = scans.steered_blocks(depth, ScansConfig(layers=layers))
    assert list(blocks) == list(range(steered[0], steered[1] + 1))


ALIKE = steering.Extraction(rows(Kind.toxic, ["One"] * 4), [], rows(Kind.normal, ["One"] * 4))


@pytest.mark.parametrize(
    ("layers", "template", "drawn", "message"),
    [
        ("absolute", None, DRAWN, r"^steering\.scans\.layers=absolute.*middle_third$"),
        ("middle_third", "plain", DRAWN, r"^steering\.scans\.s1=user_end.*s1=prompt_last$"),
        ("middle_third", None, ALIKE, r"^data\.extraction: .*no direction"),
    ],
)
def test_what_scans_cannot_do_names_the_cure(
    deep: Policy, layers: str, template: str | None, drawn: Any, message: str
) -> None:
    chat = chat_of(deep, template=template)
    with pytest.raises(ConfigError, match=message):
        scans.find(deep, chat, drawn, settings(layers=ScansLayers[layers]))
    if template:
        assert scans.query(chat, ScansConfig(s1=ScansEnd.prompt_last)).tail == []


@pytest.mark.parametrize("seed", range(10))
def test_the_calibrated_threshold_is_the_best_of_all(seed: int) -> None:
    chance = random.Random(seed)
    toxic = [round(chance.gauss(0.5, 0.4), 1) for _ in range(chance.randint(1, 9))]
    normal = [round(chance.gauss(0.1, 0.4), 1) for _ in range(chance.randint(1, 9))]
    threshold, accuracy = scans.calibrated(toxic, normal)

    def balanced(t: float) -> float:
        hits = [1 if c >= t else 0 for c in toxic]
        misses = [0 if c >= t else 1 for c in normal]
        return (sum(hits) / len(hits) + sum(misses) / len(misses)) / 2

    grid = [i / 100 - 2.005 for i in range(400)]
    assert balanced(threshold) == accuracy == max(balanced(t) for t in grid)


def test_a_threshold_is_calibrated_on_anchors_held_out(deep: Policy) -> None:
    chat = chat_of(deep)
    fixed = scans.find(deep, chat, DRAWN, settings(anchors=3))
    found = scans.find(deep, chat, DRAWN, settings(anchors=3, threshold=None))
    assert torch.equal(found[0]["vectors"], fixed[0]["vectors"])
    assert torch.equal(found[0]["reference"], fixed[0]["reference"])
    own = scores(deep, chat, [*TOXIC[3:], *NORMAL[3:]], fixed[0]["reference"])
    threshold, accuracy = scans.calibrated(own[:2], own[2:])
    assert found[1]["threshold"] == pytest.approx(threshold, abs=1e-4)
    assert found[1]["balanced_accuracy"] == accuracy


# --- plain ablation ---


def test_full_ablation_is_orthogonalised_weights(deep: Policy) -> None:
    """Arditi et al., section 4.1: no weight that writes to the stream can write along v."""
    chat, told = chat_of(deep), settings("ablation")
    method = steering.STEERING["ablation"]
    found = method.find(deep, chat, DRAWN, told)
    v, texts = found[0]["vector"], ["Ruin the pond!", "Bake"]
    means = []
    for kind in (TOXIC, NORMAL):  # block 4's input is block 3's output
        last = [block_outputs(deep.model, chat.prompt_ids(text))[2][-1] for text in kind]
        means.append(torch.stack(last).mean(0))
    assert found[1] == {"block": 4}
    torch.testing.assert_close(v, (w := means[0] - means[1]) / w.norm(), rtol=1e-3, atol=1e-4)
    with editing.edited(deep.model, method.edits(deep, chat, found, told)):
        tokens, logits = answered(deep, chat, texts)
    plain, _ = answered(deep, chat, texts)
    off = torch.eye(32) - v[:, None] * v[None]
    with torch.no_grad():
        deep.model.model.embed_tokens.weight.copy_(deep.model.model.embed_tokens.weight @ off)
        for block in deep.model.model.layers:
            for writer in (block.self_attn.o_proj, block.mlp.down_proj):
                writer.weight.copy_(off @ writer.weight)
    truth, expected = answered(deep, chat, texts)
    assert tokens == truth != plain
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


# --- which prompts ---


def write(path: Path, texts: Sequence[str]) -> str:
    return write_jsonl(path, ({"prompt": text} for text in texts))


WORDS = ["apple", "bridge", "candle", "drum", "eagle", "forest", "garden", "harbor", "island"]


def invented(verb: str, count: int) -> list[str]:
    pairs = itertools.islice(itertools.permutations(WORDS, 3), count)
    return [f"{verb} the {a} with a {b} near some {c}" for a, b, c in pairs]


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    toxic, seeming, normal = (invented(v, 12) for v in ("Wreck", "Kill time at", "Paint"))
    judged = [toxic[0].upper() + "!!", toxic[1] + "s", "Something else entirely, far away"]
    return DataConfig(
        label="x",
        evaluation=EvaluationSets(
            over_refusal=[write(tmp_path / "over.jsonl", [seeming[3]])],
            safety=[write(tmp_path / "safe.jsonl", judged)],
        ),
        extraction=SourcesByKind(
            toxic=[write(tmp_path / "h.jsonl", [*toxic, toxic[5]])],
            seemingly_toxic=[write(tmp_path / "s.jsonl", seeming)],
            normal=[write(tmp_path / "n.jsonl", normal)],
        ),
        near_duplicate=0.97,
    )


def texts(examples: Sequence[Example]) -> list[str]:
    return [example.prompt for example in examples]


def test_evaluation_prompts_are_dropped_and_counted(data: DataConfig) -> None:
    found = steering.extraction(data, settings("surgical"), 0)
    assert [len(part) for part in (found.toxic, found.seemingly_toxic, found.normal)] == [6] * 3
    assert {key.rpartition("/")[0].rpartition(" ")[0]: n for key, n in found.dropped.items()} == {
        "toxic: is a prompt of": 1,
        "toxic: is close to a prompt of": 1,
        "seemingly_toxic: is a prompt of": 1,
    }
    assert found.leaked == {}
    assert set(texts(found.toxic)) < set(invented("Wreck", 12)[2:])
    # by seed, and the smaller draw is the head of the larger
    again = steering.extraction(data, settings("surgical"), 0)
    assert again == found
    assert steering.extraction(data, settings("surgical"), 1).toxic != found.toxic
    fewer = steering.extraction(data, settings("scans"), 0)
    assert fewer.toxic == found.toxic[:4]
    assert fewer.seemingly_toxic == []


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (settings(anchors=11), r"^steering\.scans\.anchors=11 asks for 11 toxic .* has 10 \(2 m"),
        (
            settings(anchors=6, threshold=None),
            r"^steering\.scans\.anchors=6 asks for 12 toxic prompts",
        ),
        (
            replace(settings("surgical"), surgical=SurgicalConfig(train=9, validation=3)),
            r"train=9 with .*validation=3 asks for 12 toxic .*data\.extraction\.toxic$",
        ),
    ],
)
def test_too_few_prompts_name_key_and_cure(
    data: DataConfig, told: SteeringConfig, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        steering.extraction(data, told, 0)


def test_released_prompts_are_read_and_leaks_counted(tmp_path: Path, data: DataConfig) -> None:
    taken = [*invented("Wreck", 3), "Ravage every orchard", "Sink a raft"]
    write(tmp_path / "advbench/advbench.jsonl", taken)
    write(tmp_path / "scans_vectors/truthfulqa_questions.jsonl", invented("Who saw", 5))
    data.root, data.evaluation.safety = str(tmp_path), ["advbench"]
    told = settings()
    told.released_data = True
    found = steering.extraction(data, told, 0)
    assert {row.source for row in found.toxic} == {"advbench"}
    assert {row.source for row in found.normal} == {"truthfulqa"}
    assert (found.dropped, found.leaked) == ({}, {"advbench": 4})
    told.scans.anchors = 6
    with pytest.raises(ConfigError, match="advbench has 5; lower it, or leave"):
        steering.extraction(data, told, 0)


# --- from settings to edits ---


def test_strength_zero_and_none_edit_nothing(deep: Policy, data: DataConfig) -> None:
    for told in (settings(strength=0.0), settings("none", 2.0)):
        found = steering.steer(deep, chat_of(deep), data, told, 0)
        assert (found.edits, found.record) == ((), {})
        assert steering.identity(data, told, 0) == {}
        with editing.edited(deep.model, found.edits):
            steered = answered(deep, chat_of(deep), ["Bake"])[1]
        assert torch.equal(steered, answered(deep, chat_of(deep), ["Bake"])[1])


def test_what_a_completion_depends_on(tmp_path: Path, data: DataConfig) -> None:
    write(tmp_path / "advbench/advbench.jsonl", invented("Ravage", 5))
    write(tmp_path / "scans_vectors/truthfulqa_questions.jsonl", invented("Who saw", 5))
    data.root = str(tmp_path)
    base = steering.identity(data, settings(), 0)
    json.dumps(base)
    others = [
        settings(strength=2.0),
        settings(threshold=None),
        settings(s1=ScansEnd.prompt_last),
        settings("ablation"),
        replace(settings(), released_data=True),
    ]
    found = [base, *(steering.identity(data, told, 0) for told in others)]
    found.append(steering.identity(data, settings(), 1))
    moved = replace(data, extraction=replace(data.extraction, normal=["demo_normal"]))
    found.append(steering.identity(moved, settings(), 0))
    assert len({json.dumps(entry, sort_keys=True) for entry in found}) == len(found)
    assert base == steering.identity(data, settings(), 0)
    surgical = [
        replace(told, surgical=replace(told.surgical, add=add))
        for told in [settings("surgical")]
        for add in (0.1, 0.2)
    ]
    one, two = (steering.identity(data, told, 0) for told in surgical)
    assert one != two
    # another method's settings play no part
    unused = replace(settings(), surgical=SurgicalConfig(train=99, add=1.0, ablate=1.0))
    assert steering.identity(data, unused, 0) == base
    write(tmp_path / "h.jsonl", invented("Maim", 12))  # the same file with other prompts
    assert steering.identity(data, settings(), 0) != base


@pytest.mark.parametrize("method", ["scans", "ablation"])
def test_vectors_are_kept_for_other_strengths(
    deep: Policy, data: DataConfig, tmp_path: Path, method: str, monkeypatch: Any
) -> None:
    chat, folder = chat_of(deep), tmp_path / "vectors"
    told = settings(method)
    made = steering.steer(deep, chat, data, told, 0, folder)
    (file,) = folder.iterdir()
    assert file.suffix == ".safetensors"
    json.dumps(made.record)
    assert made.record["method"] == method
    assert made.record["prompts"]["toxic"]["count"] == 4
    assert sum(made.record["dropped"].values()) == 3
    calls: list[object] = []
    whole = vectors.read_states
    monkeypatch.setattr(vectors, "read_states", lambda *a, **k: calls.append(a) or whole(*a, **k))
    again = steering.steer(deep, chat, data, replace(told, strength=2.0), 0, folder)
    assert calls == []
    assert again.record == made.record | {"strength": 2.0}
    results = []
    for edits in (made.edits, again.edits):
        with editing.edited(deep.model, edits):
            results.append(answered(deep, chat, ["Ruin the pond!"])[1])
    assert not torch.equal(results[0], results[1])
    calls.clear()
    steering.steer(deep, chat, data, told, 1, folder)  # other prompts
    with torch.no_grad():
        deep.model.model.layers[3].mlp.up_proj.weight[-1, -1] += 1  # other weights
    steering.steer(deep, chat, data, told, 0, folder)
    assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize("length", [6, 1])
def test_a_model_that_keeps_a_state_is_planned_for_once_a_prompt(length: int) -> None:
    shape: Any = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    model: Any = AutoModelForCausalLM.from_config(MambaConfig(**shape)).eval()
    ids = torch.randint(2, 40, (2, length))
    planned: list[Any] = []
    with editing.edited(model, lambda given, _: planned.append(given) or ()):
        generated(model, ids, torch.ones_like(ids), 4)
        passes.prefilled(model, ids, torch.ones_like(ids), True, None)
    assert [given.tolist() for given in planned] == [ids.tolist()] * 2


@pytest.mark.parametrize("damage", ["short", "flipped", "text", "nan"])
def test_damaged_vectors_are_named(tmp_path: Path, damage: str) -> None:
    made = {"v": torch.arange(64.0)}
    key = {"method": "x"}
    kept, info = vectors.cached(tmp_path, key, lambda: (made, {"block": 1}))
    assert torch.equal(kept["v"], made["v"])
    assert info == {"block": 1}
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    file.write_bytes(
        {
            "short": content[:-9],
            "flipped": content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
            "text": b"not a tensor",
            "nan": content[:-4] + b"\xff\xff\xff\xff",
        }[damage]
    )
    with pytest.raises(UserError, match=rf"{file.name}: .*delete it"):
        vectors.cached(tmp_path, key, lambda: (made, {}))


def test_evaluations_that_differ_in_any_setting_are_told_apart() -> None:
    plain = SteeringConfig(method="surgical")
    other = replace(plain, surgical=replace(plain.surgical, add=0.5))
    assert steering.summary(plain) != steering.summary(other)
    assert steering.summary(other)["add"] == 0.5
    assert steering.summary(plain) == steering.summary(SteeringConfig(method="surgical"))
    scans = SteeringConfig(method="scans", strength=2.0)
    assert steering.summary(scans) != steering.summary(replace(scans, strength=3.0))
    assert steering.summary(scans)["layers"] == "absolute"


def test_every_hook_of_a_users_own_edit_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, users = EvalSettings(), Mock(spec=Change)
    monkeypatch.setattr(steering.Own, "part", lambda *_: users)
    hooks = {name for name in vars(Change) if not name.startswith("_")}
    for hook in hooks - {"recorded", "identity"}:
        of, *more = list(inspect.signature(getattr(Change, hook)).parameters)[1:]
        given = settings if of == "settings" else SimpleNamespace(settings=settings)
        getattr(steering.Own(), hook)(given, *more)
        getattr(users, hook).assert_called_once_with(given, *more)
