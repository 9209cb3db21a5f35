"""The stages behind the weights of a run, and what each of them cost."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dcr.core.config import STAGES


def stages_behind(made_with: Mapping[str, Any], weights: str) -> list[str]:
    """The stages that trained some weights of a run with this configuration.

    They are among contrastive, sft and readout. A snapshot is one of SFT; a base model has none.
    """
    last = "sft" if weights == "snapshot" else weights
    order = [stage.value for stage in STAGES if stage.value != "contrastive"]
    if made_with.get("method") == "dcr":
        order = ["contrastive", *order]
    return order[: order.index(last) + 1] if last in order else []


def last_stage(made_with: Mapping[str, Any]) -> Literal["sft", "readout"]:
    """The stage whose result a run of this configuration ends with."""
    steps = ((made_with.get("sft") or {}).get("readout") or {}).get("steps")
    return "readout" if steps else "sft"


@dataclass(frozen=True)
class Cost:
    """`<stage>.cost.json`: the cost of a stage's steps in the process that took the last of them.

    It does not contain the steps of a process that was stopped before.
    """

    steps: int
    seconds: float
    tokens: int
    tokens_per_second: float
    peak_memory_gib: float
    device: str
    device_seconds: float  # of the GPU, or of all cores
    precision: str  # never auto

    def of_all_steps(self, stage: str, metrics: Iterable[Mapping[str, Any]]) -> float:
        """The factor from these steps to all steps of the stage in the logged metrics."""
        steps = {row["step"] for row in metrics if row["key"].startswith(f"{stage}/step_")}
        return max(self.steps, len(steps)) / self.steps
