"""Which layer and which pair of sources stage one should use, measured on the user's own model.

The criterion is transfer: a linear probe fitted at a layer to the sources of stage one, seemingly
toxic against toxic, tested on prompts of another origin. In distribution nearly every layer and
pair looks alike, since a probe may tell two sources apart by their grammar alone.

`origins` names candidates and test sets and reads them, `transfer` measures and compares, and
`python -m dcr.choice` says what was found.
"""

from typing import TYPE_CHECKING

from dcr import on_demand

if TYPE_CHECKING:
    from dcr.choice.transfer import Choice, best_layer, choose
else:
    __getattr__ = on_demand(__name__, "transfer")
