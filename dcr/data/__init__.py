"""Which rows each stage sees, in which order, as which tensors.

`splits` cleans sources and draws disjoint rows, and `module` is the LightningDataModule that both
stages share, which orders and pads them.
"""

from dcr.data.module import (
    DRAWS,
    NO_CLASS,
    SEEMINGLY_TOXIC,
    TOXIC,
    EpochBatches,
    PairBatch,
    PromptBatch,
    SafetyData,
    check_lengths,
    generator,
    micro_batches,
    pair_batch,
    prompt_batch,
    prompt_rows,
    share,
)
from dcr.data.splits import (
    HELD_OUT_PAIRS,
    Splits,
    answered,
    answered_pairs,
    apart,
    evaluation_prompts,
    read_answers,
    row_record,
    rows_of,
    split,
    trained_texts,
    twins_of,
)
