"""Which rows each stage sees, in which order, as which tensors.

`splits` cleans sources and draws disjoint rows, `batches` orders and pads them, and `module` is
the LightningDataModule that both stages share.
"""

from dcr.data.batches import (
    DRAWS,
    NO_CLASS,
    SEEMINGLY_TOXIC,
    TOXIC,
    EpochBatches,
    PairBatch,
    PromptBatch,
    balanced_draws,
    generator,
    micro_batches,
    pair_batch,
    prompt_batch,
    proportional_draws,
    share,
    stratified_draws,
)
from dcr.data.module import SafetyData, check_lengths
from dcr.data.splits import (
    HELD_OUT_PAIRS,
    Splits,
    answered,
    read_answers,
    row_record,
    split,
    trained_texts,
    warn_of_forms,
)
