"""The plan's peak of stage one against what a process's own memory grows by, at real shapes.

Widths are an eighth or a quarter of the real ones; blocks, heads and their kinds are all there.
"""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from dcr import builtin, continuing, resolving

LLAMA3_8B = {
    **{"model_type": "llama", "hidden_size": 512, "intermediate_size": 1792, "vocab_size": 16032},
    **{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    "tie_word_embeddings": False,
}
QWEN2_5_7B = {
    **{"model_type": "qwen2", "hidden_size": 448, "intermediate_size": 2368, "vocab_size": 19008},
    **{"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4},
    "tie_word_embeddings": False,
}
QWEN2_5_1_5B = {
    **{"model_type": "qwen2", "hidden_size": 384, "intermediate_size": 2240, "vocab_size": 37984},
    **{"num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2},
    "tie_word_embeddings": True,
}
SMOLLM2_135M = {  # as it is
    **{"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "vocab_size": 49152},
    **{"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3},
    "tie_word_embeddings": True,
}
ROWS, LENGTH = 16, 32
ALIKE = 20  # of LENGTH, that rows begin with where a CPU's own passes are asked for
CASES: list[tuple[str, dict[str, Any], int, str]] = [
    ("llama3_8b / 8", LLAMA3_8B, 15, ""),
    ("llama3_8b / 8", LLAMA3_8B, 15, "dcr.nll.weight=0"),
    ("llama3_8b / 8", LLAMA3_8B, 15, "dcr.gradient_checkpointing=true"),
    ("llama3_8b / 8", LLAMA3_8B, 15, "dcr.precision=fp32"),
    ("llama3_8b / 8", LLAMA3_8B, 15, "dcr.adapter=lora"),
    ("llama3_8b / 8", LLAMA3_8B, 15, "dcr.adapter=lora dcr.precision=bf16"),
    ("llama3_8b / 8", LLAMA3_8B, 15, "dcr.optim.moments=int8"),
    ("qwen2_5_7b / 8", QWEN2_5_7B, 13, ""),
    ("qwen2_5_7b / 8", QWEN2_5_7B, 13, "dcr.gradient_checkpointing=true"),
    ("qwen2_5_1_5b / 4", QWEN2_5_1_5B, 13, ""),
    ("smollm2_135m", SMOLLM2_135M, 14, ""),
    ("smollm2_135m", SMOLLM2_135M, 14, "dcr.gradient_checkpointing=true"),
    ("smollm2_135m, packed", SMOLLM2_135M, 14, ""),
    ("smollm2_135m, packed", SMOLLM2_135M, 14, "dcr.nll.weight=0"),
]


def measured(shape: dict[str, Any], block: int, settings: str, packed: bool) -> tuple[float, float]:
    """Bytes a process of its own was planned to need and needed, without its libraries."""
    asked = {"shape": shape, "block": block, "settings": settings, "packed": packed}
    told = json.dumps(asked)
    # what is freed goes back at once, so that what a process holds is what is in use
    freeing = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    child = subprocess.run(
        [sys.executable, __file__, told],
        env=os.environ | freeing,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    planned, needed = json.loads(child.stdout.splitlines()[-1])
    return planned, needed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape", "block", "settings"), CASES, ids=[f"{c[0]} {c[3]}" for c in CASES]
)
def test_the_planned_peak_is_the_measured_one(
    name: str, shape: dict[str, Any], block: int, settings: str
) -> None:
    if "int8" in settings:
        pytest.importorskip("bitsandbytes")
    planned, needed = measured(shape, block, settings, "packed" in name)
    assert planned == pytest.approx(needed, rel=0.1)


def private() -> int:
    """Bytes this process holds that no file stands behind."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def child(shape: dict[str, Any], block: int, settings: str, packed: bool) -> None:
    """Train three steps on random weights and rows, and print what was planned and needed."""
    import torch
    from tiny_run import fit
    from transformers import AutoConfig, AutoModelForCausalLM

    from dcr import cli
    from dcr.core import learning
    from dcr.core.config import Precision, Stage
    from dcr.core.config.training import Adapter
    from dcr.core.models import Policy, structure
    from dcr.core.training import LIGHTNING_PRECISION
    from dcr.core.training.stages import ContrastiveModule
    from dcr.extensions import TrainSettings
    from dcr.fast import packing
    from dcr.fast.passes import Fast
    from dcr.plan import cost

    learning.use(Fast())
    if not packed:  # as on a GPU
        mock.patch.object(packing, "packs", return_value=packing.Packing.padded).start()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    told = ["model=llama3_8b", f"dcr.layer={block}", "trainer.accelerator=cpu", *settings.split()]
    made = resolving.resolve(cli.compose("train", told), TrainSettings)
    made, _ = continuing.with_precisions(made)
    made.model.architecture = shape
    node, batches = made.dcr, [batch(shape["vocab_size"], packed) for _ in range(3)]

    def train(**smaller: int) -> None:
        dtype = torch.bfloat16 if node.precision is Precision.bf16 else torch.float32
        made_of: Any = shape | smaller
        built = AutoConfig.for_model(**made_of)
        model = AutoModelForCausalLM.from_config(built, dtype=dtype)
        if node.adapter is Adapter.lora:
            model = structure.add_lora(model, node.lora, 0, blocks=block)
        policy = Policy(model, builtin.byte_tokenizer(), "random")
        module = ContrastiveModule(policy, node, block, 3)
        learning.current().shrink_frozen(model, block, whole=module.anchored, settings=made)
        fit(module, batches, precision=LIGHTNING_PRECISION[node.precision])

    heads = shape["num_attention_heads"]
    train(hidden_size=2 * heads, intermediate_size=64)  # what libraries load when first used
    floor = private()
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], private())
            time.sleep(0.003)

    watching = threading.Thread(target=watch)
    watching.start()
    train()
    done.set()
    watching.join()
    tokens = ROWS * LENGTH - (ROWS - 1) * ALIKE * packed
    full = tokens * (node.nll.weight > 0)
    labelled = ROWS * (LENGTH - 1) * (node.nll.weight > 0)
    trunk = 0 if full else tokens
    load = cost.Load(trunk, full, trunk + full, labelled, trunk, full, 0)
    planned = cost.memory(made, Stage.contrastive, cost.stage_shape(made, Stage.contrastive), load)
    needed = peak[0] - floor
    print({name: round(value / 1e6) for name, value in planned.items()}, file=sys.stderr)
    print(json.dumps([sum(planned.values()) - planned["process"], needed]))


def batch(vocabulary: int, packed: bool) -> Any:
    import torch

    from dcr.core.data.rows import PromptBatch

    ids = torch.randint(0, vocabulary, (ROWS, LENGTH))
    ids[:, : ALIKE * packed] = ids[0, : ALIKE * packed]
    return PromptBatch(
        ids=ids,
        mask=torch.ones_like(ids, dtype=torch.bool),
        labels=torch.arange(ROWS) % 2,
        spans=torch.tensor([[0, LENGTH]] * ROWS),
        targets=torch.cat([ids[:, 1:], torch.full((ROWS, 1), -100)], 1),
        names=tuple(map(str, range(ROWS))),
    )


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
    child(**json.loads(sys.argv[1]))
