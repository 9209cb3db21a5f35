"""Makes one table in the terminal and one self-contained HTML page from run folders.

`building.build` makes the sections that `sections` lists: the page, and beside it, if asked for,
the paper's tables and figures and the claims.
"""
