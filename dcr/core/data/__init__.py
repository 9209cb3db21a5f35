"""The rows that each stage sees, their order, and their tensors.

`splits` cleans sources and draws disjoint rows, `rows` tokenises and orders them, and `module` is
the LightningDataModule that all stages share, which pads them.
"""

from typing import TYPE_CHECKING

from dcr import on_demand
from dcr.core.data.rows import (
    DRAWS,
    LABELS,
    NO_CLASS,
    SEEMINGLY_TOXIC,
    TOXIC,
    EpochBatches,
    ReadoutRows,
    StageRows,
    check_lengths,
    generator,
    micro_batches,
    permutation,
    prompt_rows,
    readout_prompts,
    readout_rows,
    share,
)
from dcr.core.data.splits import (
    HELD_OUT_PAIRS,
    Added,
    Cleaning,
    Open,
    Overlap,
    Splits,
    apart,
    evaluation_prompts,
    overlaps,
    row_record,
    rows_of,
    split,
    with_readout,
    without,
)

if TYPE_CHECKING:
    from dcr.core.data.module import (
        PairBatch,
        PromptBatch,
        ReadoutBatch,
        SafetyData,
        pair_batch,
        prompt_batch,
        readout_batch,
    )
else:
    __getattr__ = on_demand(__name__, "module")
