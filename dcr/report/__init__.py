"""From run folders to one table in the terminal and one self-contained HTML page.

`build` makes the sections that `dcr.report.sections` lists: the page, with the paper's tables and
figures and the claims beside it where they are asked for.
"""

from typing import TYPE_CHECKING

from dcr import on_demand
from dcr.report.sections import FIGURES, MARGIN, OPERATING, SECTIONS, TABLES

if TYPE_CHECKING:
    from dcr.report.building import build
else:
    __getattr__ = on_demand(__name__, "building")
