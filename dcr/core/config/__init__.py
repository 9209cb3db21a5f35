"""The typed configuration: one tree of dataclasses, its defaults, and every check of it.

Hydra composes, `resolving.resolve` makes plain dataclasses of the result once, and below the entry
scripts nothing else travels. `schema` holds settings, choices and defaults, `resolving` the ranges
and relations of them as well, and `evaluation` the settings of `eval.py` alone: training opens
neither of the two.
"""

from pathlib import Path

from dcr.core.config.schema import (
    ALL_LINEAR,
    AUTO_LAYER,
    COUNTS,
    EMBEDDED_MODEL,
    STAGES,
    TINY_MODEL,
    Adapter,
    AugmentConfig,
    ContrastiveConfig,
    CountedSourceConfig,
    DataConfig,
    EvaluationSets,
    Kind,
    LoraConfig,
    Method,
    ModelConfig,
    Moments,
    NLLConfig,
    NLLSource,
    Part,
    Pooling,
    Precision,
    ReadoutConfig,
    SafetyPairsConfig,
    Sampler,
    Schedule,
    Settings,
    SFTConfig,
    SourceConfig,
    SourcesByKind,
    Stage,
    Terminator,
    TrainConfig,
    TrainTable,
    WandbConfig,
    WandbMode,
    Weights,
    stages_of,
)
from dcr.core.config.values import (
    FSDP,
    TAG,
    ConfigError,
    DataError,
    OwnPath,
    UserError,
    block_of,
    check_installed,
    check_made_with,
    class_of,
    is_path,
    literal,
    plain,
)

PACKAGE = Path(__file__).parents[2]
# within an installed package; beside it in a checkout
CONF = next(p / "conf" for p in (PACKAGE, PACKAGE.parent) if (p / "conf" / "train.yaml").is_file())
