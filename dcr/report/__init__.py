"""Makes one table in the terminal and one self-contained HTML page from run folders.

`building.build` makes the sections that `sections` lists: the page, and beside it, if asked for,
the paper's tables and figures and the claims.

A number comes into a table in four steps. `dcr.results.frame` makes rows of an evaluation's
`metrics.json`. `grids.rate`, or `grids.ranked`, looks rows of some sets up, pools them and gives a
cell with its interval and marks. A section, such as `tables.results`, puts a cell for each column
in rows, and rows in blocks. `building` prints them and `page` shows them. `columns` says which
evaluations are columns, and their names.
"""
