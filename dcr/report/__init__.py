"""Makes one table in the terminal and one self-contained HTML page from run folders.

`build` makes the sections that `dcr.report.sections` lists: the page, and beside it, if asked for,
the paper's tables and figures and the claims.
"""

from typing import TYPE_CHECKING

from dcr import on_demand
from dcr.report.sections import FIGURES, MARGIN, OPERATING, SECTIONS, TABLES

if TYPE_CHECKING:
    from dcr.report.building import build
else:
    __getattr__ = on_demand(__name__, "building")
