"""Which layer and which pair of sources stage one should use, measured on the user's own model.

python -m dcr.choice model=<name> data=<name> [data.root=<data>] [pairs=<a>:<b>,…] [limit=200]

The criterion is transfer: a linear probe fitted at a layer to the sources of stage one, seemingly
toxic against toxic, tested on prompts of another origin. In distribution nearly every layer and
pair looks alike, since a probe may tell two sources apart by their grammar alone.

`origins` names candidates and test sets and reads them, `ranking` measures and compares, and `text`
says what was found.
"""

from dcr.choice.choosing import Choice, best_layer, choose
from dcr.choice.origins import LIMIT

__all__ = ["LIMIT", "Choice", "best_layer", "choose"]
