"""STL-aug: SFT learns compliant answers to seemingly toxic prompts too.

Here are its settings; `rows` adds the answers to SFT's rows, and `dcr.augment` writes such answers
into a file.
"""

from dataclasses import dataclass

from dcr.resolving import positive, ranged


@dataclass
class AugmentConfig:
    """STL-aug: compliant answers to seemingly toxic prompts, added to the rows of SFT."""

    responses: str | None = None  # a JSONL file with prompt and response
    # how often each answer stands among the rows
    repeat: int = ranged(1, positive, "give 1 or more")
