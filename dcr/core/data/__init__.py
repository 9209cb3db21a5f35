"""Which rows each stage sees, in which order, as which tensors.

`splits` cleans sources and draws disjoint rows, `order` says when each comes up, `rows` tokenises
them, `readout` those of the third stage, and `module` is the LightningDataModule that all stages
share, which pads them.
"""

from typing import TYPE_CHECKING

from dcr import on_demand
from dcr.core.data.order import DRAWS, EpochBatches, generator, permutation, share
from dcr.core.data.readout import ReadoutRows, readout_prompts, readout_rows
from dcr.core.data.rows import (
    LABELS,
    NO_CLASS,
    SEEMINGLY_TOXIC,
    TOXIC,
    StageRows,
    check_lengths,
    micro_batches,
    prompt_rows,
)
from dcr.core.data.splits import (
    HELD_OUT_PAIRS,
    Added,
    Cleaning,
    Splits,
    apart,
    evaluation_prompts,
    row_record,
    rows_of,
    split,
    split_readout,
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
