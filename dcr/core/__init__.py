"""The core: both commands with their defaults, from settings to a table.

With `dcr.train` and `dcr.eval` it is all that a reader of the method needs. It imports nothing of
the extensions beside it, which `dcr.commands` hands in; import-linter holds it to that.
"""
