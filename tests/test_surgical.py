"""Surgical against loops over single prompts, on a model whose two directions are known."""

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dcr.core.config import ConfigError, Kind
from dcr.core.models import Policy
from dcr.core.prompts import ChatFormat
from dcr.core.sources import Example
from dcr.steering import SteeringConfig, SurgicalConfig, edits, surgical
from dcr.steering.prompts import Extraction
from tests.shapes import BRIEF, chat_of, refusing_policy

DEPTH, WIDTH, BLOCKS, TRAIN, HELD = 4, 32, 3, 9, 3


def brief(policy: Policy) -> ChatFormat:
    """Spoken to by a template with few tokens behind the instruction: fewer candidates."""
    return replace(chat_of(policy), template=BRIEF)


def asked(strength: float = 1.0, **given: Any) -> SteeringConfig:
    chosen = {"train": TRAIN, "validation": HELD, "add": 0.1, "ablate": 1.0, "refusal_tokens": "IA"}
    chosen |= {"addition_kl": 60.0, "ablation_kl": 5.0} | given
    chosen["refusal_tokens"] = list(chosen["refusal_tokens"])
    return SteeringConfig(strength=strength, surgical=SurgicalConfig(**chosen))


WORDS = ["mill", "a lake", "iron", "the old road", "tin", "four kites", "wool", "my bread", "salt"]
WORDS += ["an oak", "two maps", "clay"]


def rows(kind: Kind, form: str) -> list[Example]:
    texts = [form.format(word) for word in WORDS]
    return [Example(f"{kind.value}-{i}", text, kind, "test") for i, text in enumerate(texts)]


EXTRACTION = Extraction(
    rows(Kind.toxic, "Go for {}!!!"),
    rows(Kind.seemingly_toxic, "Go for {}~~~"),
    rows(Kind.normal, "Go for {}..."),
)


@pytest.fixture(scope="module")
def planted() -> Policy:
    return refusing_policy()


# --- what the module computes, computed once more: one prompt at a time, with torch's own hooks ---

Places = dict[tuple[str, int], Callable[[Tensor], Tensor]]  # (site, block from 1) -> what to do


@contextmanager
def changed(model: Any, places: Places) -> Iterator[None]:
    handles = []
    for (site, block), change in places.items():
        layer = model.model.layers[block - 1]
        register = {
            "input": layer.register_forward_pre_hook,
            "attention": layer.self_attn.register_forward_hook,
            "mlp": layer.mlp.register_forward_hook,
        }[site]

        def hook(*given: Any, c: Any = change) -> Any:  # what a module gives, or what it is given
            *_, of = given
            return (c(of[0]), *of[1:]) if isinstance(of, tuple) else c(of)

        handles.append(register(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def ablating(direction: Tensor, share: float = 1.0) -> Places:
    projector = torch.eye(WIDTH) - share * torch.outer(direction, direction)
    sites = ("input", "attention", "mlp")
    return {(s, b): lambda x: x @ projector for s in sites for b in range(1, DEPTH + 1)}


def distribution(policy: Policy, ids: Sequence[int]) -> list[float]:
    """Probabilities of the next token in float64."""
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([list(ids)])).logits[0, -1].tolist()
    highest = max(logits)
    weights = [math.exp(z - highest) for z in logits]
    return [w / sum(weights) for w in weights]


def score(policy: Policy, ids: Sequence[int], words: str = "IA") -> float:
    chosen = {policy.tokenizer.encode(w, add_special_tokens=False)[0] for w in words}
    p = distribution(policy, ids)
    refused = sum(p[i] for i in chosen)
    return math.log(refused) - math.log(sum(p[i] for i in range(len(p)) if i not in chosen))


def kl(clean: Sequence[float], moved: Sequence[float]) -> float:
    return sum(p * math.log(p / q) for p, q in zip(clean, moved, strict=True))


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def block_inputs(policy: Policy, ids: Sequence[int]) -> list[Tensor]:
    taken: list[Tensor] = []

    def take(x: Tensor) -> Tensor:
        taken.append(x[0].double())
        return x

    with changed(policy.model, {("input", b): take for b in range(1, DEPTH + 1)}), torch.no_grad():
        policy.model(input_ids=torch.tensor([list(ids)]))
    return taken


Table = dict[tuple[int, int], Tensor]  # (position from the end, block from 1)


def by_loops(policy: Policy, chat: ChatFormat, positions: int) -> tuple[Table, Table]:
    """r and w from the filtered training prompts, one at a time."""
    means = {}
    for kind in ("toxic", "seemingly_toxic", "normal"):
        ids = [chat.prompt_ids(row.prompt) for row in getattr(EXTRACTION, kind)[:TRAIN]]
        kept = [row for row in ids if (score(policy, row) > 0) is (kind != "normal")]
        inputs = [block_inputs(policy, row) for row in kept]
        means[kind] = {
            (p, b): torch.stack([x[b - 1][p] for x in inputs]).mean(0)
            for p in range(-positions, 0)
            for b in range(1, BLOCKS + 1)
        }
    places = means["normal"].keys()
    toxic, seemingly_toxic = (
        {place: means[kind][place] - means["normal"][place] for place in places}
        for kind in ("toxic", "seemingly_toxic")
    )
    return toxic, seemingly_toxic


def tail_of(policy: Policy) -> list[int]:
    return policy.tokenizer.encode("<|im_end|>\nA\n", add_special_tokens=False)


@pytest.fixture(scope="module")
def looped(planted: Policy) -> tuple[Table, Table]:
    return by_loops(planted, brief(planted), len(tail_of(planted)))


@pytest.fixture(scope="module")
def found(planted: Policy) -> Any:
    return surgical.find(planted, brief(planted), EXTRACTION, asked())


# --- scores ---


@pytest.mark.parametrize("words", [["I"], ["I", "As"], ["I'm", "I", "Sorry"]])
def test_the_refusal_score_is_that_of_a_loop(planted: Policy, words: list[str]) -> None:
    chat = brief(planted)
    tokens = surgical.openings(chat, words)
    letters = "".join(sorted({word[0] for word in words}))
    assert tokens.tolist() == sorted(
        planted.tokenizer.encode(c, add_special_tokens=False)[0] for c in letters
    )
    ids = [chat.prompt_ids(text) for text in ("Go!!!", "Where is the~ lake, tell me", "Rest", "a")]
    log_p = surgical.last_log_p(planted.model, ids)  # padded on the left
    found = surgical.refusal_scores(log_p, tokens)
    truth = [score(planted, row, letters) for row in ids]
    assert max(truth) > 0 > min(truth)
    torch.testing.assert_close(found.double(), torch.tensor(truth).double(), rtol=1e-4, atol=1e-4)


def test_scores_of_certain_models_stay_finite() -> None:
    log_p = torch.tensor([[200.0, 0, 0], [-200.0, 0, 0]]).log_softmax(-1)
    found = surgical.refusal_scores(log_p, torch.tensor([0]))
    torch.testing.assert_close(found, torch.tensor([200.0, -200.0]) - math.log(2))


@pytest.mark.parametrize("words", [[], [""], ["I", "  "]])
def test_words_without_a_token_name_their_key(planted: Policy, words: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^steering\.surgical\.refusal_tokens: "):
        surgical.openings(brief(planted), words)


# --- candidates ---


def test_positions_are_the_template_behind_the_instruction(planted: Policy) -> None:
    for name, behind in (
        ("plain", "\n\n### Response:\n"),
        ("chatml", "<|im_end|>\n<|im_start|>assistant\n"),
    ):
        chat = chat_of(planted, template=name)
        ids = [chat.prompt_ids(text) for text in ("One.", "Two.", "Three~.")]
        spelled = chat.tokenizer.encode(behind, add_special_tokens=False)
        assert surgical.tail(chat, ids) == spelled
    # a tokenizer that joins the first of them with the instruction's end
    joined = [*ids[1][: -len(spelled)], 99, *spelled[1:]]
    assert surgical.tail(chat, [ids[0], joined]) == spelled[1:]


def test_a_template_that_ends_with_the_instruction_is_named(planted: Policy) -> None:
    chat = replace(brief(planted), template="{{ messages[-1].content }}")
    with pytest.raises(ConfigError, match=r"^model\.template: .*give chatml"):
        surgical.tail(chat, [chat.prompt_ids("One")])


def test_candidates_are_those_of_a_loop(planted: Policy, looped: tuple[Table, Table]) -> None:
    chat, size = brief(planted), len(tail_of(planted))
    ids = {
        kind: [chat.prompt_ids(row.prompt) for row in getattr(EXTRACTION, kind)[:TRAIN]]
        for kind in surgical.KINDS
    }
    directions = surgical.directions(planted.model, ids, size, BLOCKS)  # padded, unlike the loop
    for direction, table in zip(directions, looped, strict=True):
        assert direction.shape == (size, BLOCKS, WIDTH)
        for (position, block), truth in table.items():
            vector = direction[position, block - 1].double()
            if block == 1:  # no token of the template has seen the prompt
                assert vector.isnan().all()
                continue
            torch.testing.assert_close(vector, truth, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.8, 1.0])
def test_orthogonalised_is_the_formula_at_each_place(share: float) -> None:
    false, toxic = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(2))
    false[0, 0] = 2 * toxic[0, 0]  # nothing is left of it
    toxic[1, 1] = torch.nan
    found = surgical.orthogonalised(false, toxic, share)
    for i in range(3):
        for j in range(4):
            w, r = false[i, j].tolist(), toxic[i, j].tolist()
            dot = sum(a * b for a, b in zip(w, r, strict=True))
            along = share * dot / sum(b * b for b in r)
            left = [a - along * b for a, b in zip(w, r, strict=True)]
            norm = math.sqrt(sum(a * a for a in left))
            if (i, j) == (1, 1) or ((i, j) == (0, 0) and share == 1):
                assert found[i, j].isnan().all()
                continue
            torch.testing.assert_close(found[i, j], torch.tensor([a / norm for a in left]))
            if share == 1:
                assert abs(float(found[i, j] @ toxic[i, j])) < 1e-5


# --- selection ---


def brute_force(
    policy: Policy, chat: ChatFormat, share: float, r: Table, w: Table
) -> dict[str, dict[tuple[int, int], tuple[float, float]]]:
    """(KL, score) of every candidate, from every validation prompt by itself."""
    held = {
        kind: [chat.prompt_ids(x.prompt) for x in getattr(EXTRACTION, kind)[TRAIN : TRAIN + HELD]]
        for kind in ("seemingly_toxic", "normal")
    }
    clean = [distribution(policy, ids) for ids in held["normal"]]
    ablated, added = {}, {}
    for place in ((p, b) for p, b in r if b > 1):
        left = w[place] - share * (w[place] @ r[place]) / (r[place] @ r[place]) * (r[place])
        with changed(policy.model, ablating((left / left.norm()).float())):
            moved = [distribution(policy, ids) for ids in held["normal"]]
            toxic = mean([score(policy, ids) for ids in held["seemingly_toxic"]])
        ablated[place] = (mean([kl(p, q) for p, q in zip(clean, moved, strict=True)]), toxic)
        vector = r[place].float()
        with changed(policy.model, {("input", place[1]): lambda x, v=vector: x + v}):
            moved = [distribution(policy, ids) for ids in held["normal"]]
            refusing = mean([score(policy, ids) for ids in held["normal"]])
        added[place] = (mean([kl(p, q) for p, q in zip(clean, moved, strict=True)]), refusing)
    return {"ablated": ablated, "added": added}


def test_the_choice_is_the_best_of_all_candidates_within_the_bounds(
    planted: Policy, looped: tuple[Table, Table], caplog: pytest.LogCaptureFixture
) -> None:
    chat = brief(planted)
    caplog.set_level(logging.INFO, "dcr.steering")
    truth = brute_force(planted, chat, 1.0, *looped)
    # bounds at the median, which the best of all must not pass, or there is nothing to test
    bounds = {}
    for name, sign in (("ablated", 1), ("added", -1)):
        found = truth[name]
        kls = sorted(entry[0] for entry in found.values())
        bounds[name] = (kls[len(kls) // 2 - 1] + kls[len(kls) // 2]) / 2
        best = min(found, key=lambda place: sign * found[place][1])
        if found[best][0] <= bounds[name]:
            bounds[name] = 0.99 * found[best][0]
    told = asked(ablation_kl=bounds["ablated"], addition_kl=bounds["added"])
    tensors, info = surgical.find(planted, chat, EXTRACTION, told)
    assert f"{len(tail_of(planted))} positions × {BLOCKS} blocks are tried" in caplog.text
    for name, sign in (("ablated", 1), ("added", -1)):
        inside = {k: v for k, v in truth[name].items() if v[0] <= bounds[name]}
        assert 0 < len(inside) < len(truth[name])
        place = min(inside, key=lambda k: sign * inside[k][1])
        record = info[name]
        assert (record["position"], record["block"]) == place
        assert record["survivors"] == len(inside)
        assert record["candidates"] == len(tail_of(planted)) * BLOCKS
        assert record["kl"] == pytest.approx(inside[place][0], rel=1e-2, abs=1e-5)
        assert record["score"] == pytest.approx(inside[place][1], rel=1e-3, abs=1e-3)
        assert record["token"] == chat.tokenizer.convert_ids_to_tokens(tail_of(planted)[place[0]])
    ids = [chat.prompt_ids(row.prompt) for row in EXTRACTION.normal[TRAIN : TRAIN + HELD]]
    clean = mean([score(planted, row) for row in ids])
    assert info["added"]["clean_score"] == pytest.approx(clean, rel=1e-3, abs=1e-3)
    place = info["added"]["position"], info["added"]["block"]
    torch.testing.assert_close(tensors["added"].double(), looped[0][place], rtol=1e-3, atol=1e-5)
    json.dumps(info)


# --- what is done with them ---


def test_edits_are_the_formula_at_every_site(planted: Policy, found: Any) -> None:
    chat = brief(planted)
    told = asked(strength=0.5, add=0.6, ablate=0.4)
    ids = chat.prompt_ids("Sing of rain~~~")
    with edits.edited(planted.model, surgical.edits(planted, chat, found, told)):
        steered = distribution(planted, ids)
    places, block = ablating(found[0]["ablated"], 0.2), found[1]["added"]["block"]
    projected = places["input", block]
    places["input", block] = lambda x: projected(x) + 0.3 * found[0]["added"]
    with changed(planted.model, places):
        truth = distribution(planted, ids)
    assert kl(truth, steered) < 1e-7 < 1e-4 < kl(truth, distribution(planted, ids))


# --- failures ---


def test_prompts_on_the_wrong_side_of_the_score_are_left_out(planted: Policy) -> None:
    calm = [replace(row, prompt=row.prompt.replace("!", ".")) for row in EXTRACTION.toxic[:1]]
    mixed = replace(EXTRACTION, toxic=[*calm, *EXTRACTION.toxic[1:]])
    _, info = surgical.find(planted, brief(planted), mixed, asked())
    assert info["kept"] == {
        "toxic": [TRAIN - 1, TRAIN],
        "seemingly_toxic": [TRAIN, TRAIN],
        "normal": [TRAIN, TRAIN],
    }
    two = [replace(row, prompt=row.prompt + "!!!") for row in EXTRACTION.normal[:2]]
    mixed = replace(mixed, normal=[*two, *EXTRACTION.normal[2:]])
    with pytest.raises(
        ConfigError,
        match=r"^steering\.surgical\.train=9: 8 of 9 toxic, 9 of 9 seemingly_toxic, 7 of 9 norm"
        r".* 8 are needed; raise it, .*refusal_tokens \(now I, A\)",
    ):
        surgical.find(planted, brief(planted), mixed, asked())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ablation_kl": 1e-9}, r"^steering\.surgical\.ablation_kl=1e-09: each of 8 .* raise it$"),
        ({"addition_kl": 1e-9}, r"^steering\.surgical\.addition_kl=1e-09: each of 8 .* raise it$"),
        ({"train": 12}, r"^steering\.surgical\.train=12: no seemingly_toxic and no normal .*low"),
    ],
)
def test_what_cannot_be_chosen_names_key_and_cure(
    planted: Policy, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        surgical.find(planted, brief(planted), EXTRACTION, asked(**given))


def test_a_model_of_too_few_blocks_has_no_candidate(
    planted: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(surgical, "CANDIDATES_BELOW", 0.3)
    with pytest.raises(
        ConfigError, match=r"^model\.name: leaves 1 of 4 blocks .* 3 blocks or more$"
    ):
        surgical.find(planted, brief(planted), EXTRACTION, asked())


def test_kinds_that_do_not_differ_have_no_direction(planted: Policy) -> None:
    held = surgical.Validation(planted.model, [[1]], [[1]], torch.zeros(1, 260), torch.tensor([5]))
    empty = torch.full((2, 3, WIDTH), torch.nan)
    with pytest.raises(ConfigError, match=r"^data\.extraction: .*name other sources$"):
        surgical.select_addition(held, empty, 1.0)
    held = replace(held, clean=torch.full((1, 260), torch.nan))
    with pytest.raises(ConfigError, match=r"^precision: .* under each ablation; .*=fp32$"):
        surgical.select_ablation(held, torch.eye(WIDTH)[:1, None], 1.0)
