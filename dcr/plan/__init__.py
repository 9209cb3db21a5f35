"""What a training command would do, read from architecture and rows: no weight is loaded.

Parameters are those of the real architecture, built without storage on torch's meta device
(`shape`). Rows, batches and steps come from the DataModule that training uses (`rows`). Memory and
time are estimates with their formulas in `cost`. `text` puts them together.
"""

from dcr.plan.text import describe

__all__ = ["describe"]
