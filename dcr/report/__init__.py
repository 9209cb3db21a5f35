"""From run folders to one table in the terminal and one self-contained HTML page.

`build` reads run folders and writes the page, with the paper's tables and figures and the claims
beside it where they are asked for; `python -m dcr.report --help` tells of the command.
"""

from typing import TYPE_CHECKING

from dcr import on_demand

# What a command may name, said here so that its help need not load what draws it.
TABLES = ("table1", "table5", "discernment", "table2", "table3", "table4")
OPERATING = "operating_points"
FIGURES = ("1a", "1b", "3", "4", "5a", "5b", "6", "6a", "6b", "7", "8", "9", OPERATING)
TABLE_ENDINGS, FIGURE_ENDINGS = ("md", "csv", "tex", "html"), ("png", "svg", "csv")
MARGIN = 2.0  # percentage points that a point of operating_points may be less safe than STL

if TYPE_CHECKING:
    from dcr.report.building import DRAWN, build
else:
    __getattr__ = on_demand(__name__, "building")
