"""Every figure by its name on the command line."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dcr.report.frontier_figure import figure4
from dcr.report.kernel_figures import KERNELS
from dcr.report.operating_figure import operating_points
from dcr.report.operating_points import MARGIN
from dcr.report.printed import Printed
from dcr.report.records import RunRecord
from dcr.report.refusal_figures import CURVES
from dcr.report.separability_figures import LAYERS

DRAWN: dict[str, Callable[[Sequence[RunRecord]], Printed]] = {
    **CURVES,
    "4": figure4,
    **KERNELS,
    **LAYERS,
}
OPERATING = "operating_points"
FIGURES = (*sorted(DRAWN), OPERATING)


@dataclass(frozen=True)
class Wanted:
    """The figures asked for; margin (percentage points) and data label are of operating points."""

    names: tuple[str, ...] = ()
    margin: float = MARGIN
    data: str | None = None

    def settings(self, name: str) -> str:
        """What a command must say beside a figure's name."""
        if name != OPERATING:
            return ""
        label = "" if self.data is None else f" data={shlex.quote(self.data)}"
        return f" margin={self.margin:g}{label}"


def figures_of(records: Sequence[RunRecord], wanted: Wanted) -> list[Printed]:
    """In the order asked. UserError, naming the command that makes them, where data are lacking."""
    return [
        operating_points(records, wanted.margin, wanted.data)
        if name == OPERATING
        else DRAWN[name](records)
        for name in wanted.names
    ]
