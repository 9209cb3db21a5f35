"""Discernment by the lm-evaluation-harness, against our own masses and a count of pairs."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from dcr import harness
from dcr.core import models, prompts, sources
from dcr.core.config import ConfigError, ModelConfig, Precision
from dcr.core.evaluation.subjects import read_openings

SETS = {"over_refusal": ["demo_seemingly_toxic_heldout"], "safety": ["demo_toxic_heldout"]}
TASK_FILES = Path(harness.__file__).parent
TURNS = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
TEMPLATES = {  # the harness treats white space at a prompt's end in a way of its own
    "newline": TURNS + "{{ '\\nA\\n' }}",
    "word": TURNS + "A:",
    "special token": TURNS,
}


@pytest.fixture
def speaking(tiny_folder: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of the tiny model with a chat template."""

    def made(template: str) -> Path:
        folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        return folder

    return made


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_harness_measures_the_masses_that_we_measure(
    template: str, speaking: Callable[[str], Path]
) -> None:
    folder = speaking(TEMPLATES[template])
    given: Any = {"pretrained": str(folder), "dtype": "float32"}
    manager = TaskManager(
        include_path=TASK_FILES, include_defaults=False, metadata=given | SETS | {"limit": 6}
    )
    found: Any = simple_evaluate(
        model="hf", model_args=given | {"device": "cpu"}, tasks=["dcr_discernment"],
        task_manager=manager, batch_size=4,
    )  # fmt: skip
    scored = [sample["auroc"] for sample in found["samples"]["dcr_discernment"]]

    config = ModelConfig(name=str(folder))
    policy = models.open_policy(config, Precision.fp32)
    chat = prompts.chat_format(policy.tokenizer, config)
    rows = [
        sources.draw(sources.read(name, scored=True), 6, seed=0)
        for name in (*SETS["over_refusal"], *SETS["safety"])
    ]
    masses = {
        opening.id: opening.mass
        for of in rows
        for batch in read_openings(policy, chat, of)
        for opening in batch
    }
    assert [toxic for toxic, _ in scored] == [0] * 6 + [1] * 6
    ours = [masses[row.id] for of in rows for row in of]
    assert [mass for _, mass in scored] == pytest.approx(ours, rel=1e-5)
    assert max(ours) > 1.001 * min(ours)
    pairs = [(t > s) + 0.5 * (t == s) for s in ours[:6] for t in ours[6:]]
    assert found["results"]["dcr_discernment"]["auroc,none"] == pytest.approx(sum(pairs) / 36)


def test_a_tokenizer_that_the_harness_reads_otherwise_is_refused(
    speaking: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = speaking(TEMPLATES["newline"])
    real = models.open_tokenizer

    def merging(config: ModelConfig) -> Any:
        """One token for the newline and the letter before it, as some vocabularies have."""
        tokenizer: Any = real(config)
        tokenizer.add_tokens(["A\n"])
        return tokenizer

    monkeypatch.setattr(models, "open_tokenizer", merging)
    with pytest.raises(ConfigError, match=r"cannot ask this tokenizer .* tasks=\[discernment\]"):
        harness.questions(pretrained=str(folder))
    with pytest.raises(ConfigError, match="no model named; give --model_args pretrained="):
        harness.questions(model="gpt-x")
