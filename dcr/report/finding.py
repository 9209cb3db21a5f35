"""What a finding on a claim is: the claims' words, the data that one may lack, numbers in words."""

import math
from dataclasses import dataclass

from dcr.report.claim_data import FEWEST_STEPS
from dcr.report.claims import Cell
from dcr.statistics import Interval

ABSENT = "not measured"
CLAIMS = {
    "joint_movement": "Refusal of toxic and of seemingly toxic prompts moves together over SFT",
    "within_rises": "The kernel within a class rises in stage one",
    "cross_falls": "The kernel across the two classes falls in stage one",
    "cross_falls_more": "The kernel across the classes falls more than the kernel within them",
    "base_asymmetry": "In the base model K(seemingly toxic, normal) exceeds K(normal, normal)",
    "size_of_change": "‖K‖ predicts how much one SGD step changes other prompts (Eq. 2, 3)",
    "signed_change": "−ηAKG predicts the signed change by one SGD step (Eq. 2, 3)",
    "refusal_spreads": "One step on a toxic prompt raises the refusal token on seemingly toxic "
    "prompts more than on normal ones",
    "proposition_1": "Proposition 1: ‖K‖ over the trunk follows the states at block ℓ",
}
KERNELS = (
    "no kernels before and after stage one over the same prompts",
    "python eval.py model=<name> tasks=[kernel], then "
    "python eval.py run={run} stage=contrastive tasks=[kernel]",
)
LACKING: dict[str, tuple[str, str]] = {
    "joint_movement": (
        f"no refusal probabilities of single prompts at {FEWEST_STEPS} or more steps of SFT",
        "python train.py tracking.quantities=[refusal_probability]",
    ),
    "within_rises": KERNELS,
    "cross_falls": KERNELS,
    "cross_falls_more": KERNELS,
    "base_asymmetry": (
        "no kernel of the base model",
        "python eval.py model=<name> tasks=[kernel]",
    ),
    **dict.fromkeys(
        ("size_of_change", "signed_change", "refusal_spreads"),
        ("no steps on toxic prompts", "python eval.py run={run} tasks=[claims]"),
    ),
}
LACKING_STATES = {  # Proposition 1 is told before and after stage one
    "base": ("nothing of the base model", "python eval.py model=<name> tasks=[claims]"),
    "contrastive": (
        "nothing after stage one",
        "python eval.py run={run} stage=contrastive tasks=[claims]",
    ),
}


@dataclass(frozen=True)
class Finding:
    """A claim of one run or evaluation; without data its `command` makes them."""

    claim: str
    verdict: str
    sentence: str
    command: str = ""
    run: str = ""
    model: str = ""
    params: str = ""
    measured: Interval | None = None
    above: bool = True  # the claimed side of 0
    beside: tuple[str, Interval] | None = None
    source: str = ""

    @property
    def title(self) -> str:
        return CLAIMS[self.claim]


def kernel_of(cell: Cell) -> str:
    """`K(toxic, normal)`: observer, then trained."""
    return f"K({', '.join(kind.replace('_', ' ') for kind in cell)})"


def number(found: Interval, *, signed: bool = False) -> str:
    """`0.52 [0.41, 0.63]`, with two digits of the interval's width and at least two decimals."""
    if not all(map(math.isfinite, vars(found).values())):
        return "undefined"
    width = found.high - found.low or abs(found.estimate) or 1.0
    places = min(max(2, 1 - math.floor(math.log10(width))), 8)
    sign = "+" if signed else ""
    estimate, low, high = (f"{end:{sign}.{places}f}" for end in vars(found).values())
    return f"{estimate} [{low}, {high}]".replace("-", "−")
