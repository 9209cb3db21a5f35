"""The layer and the pair of sources that stage one should use, measured on the user's own model.

The criterion is transfer: a linear probe is fitted at a layer to the sources of stage one,
seemingly toxic against toxic, and tested on prompts of another origin. Within its own sources a
probe does well at nearly every layer, since it may tell them apart by their grammar alone.

`origins` names candidates and test sets and reads them, `transfer` measures and compares, and
`python -m dcr.choice` prints the result.
"""
