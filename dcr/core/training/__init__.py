"""All stages, from the weights that each starts from to its result, and what extensions may add.

`stages` puts a stage together, `contrastive`, `sft` and `readout` hold the training steps;
`resuming` holds what they share and makes training go on after a kill, and `callbacks` leaves logs,
snapshots and costs. The protocols here are those of the extensions that `config.TrainTable` names.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lightning import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from dcr.core.config import Stage, TrainConfig
from dcr.core.data import Splits
from dcr.core.models import Policy
from dcr.core.prompts import ChatFormat
from dcr.core.runs import Run

# Adds to a run's `rows.json`, and gives a line for each thing to warn of.
Examine = Callable[[Splits], tuple[Mapping[str, Any], list[str]]]
# Measures on a model, before it trains, the block whose states stage one should read.
FindLayer = Callable[[TrainConfig], int]
# Makes the callbacks that measure while a stage of so many steps trains.
Watched = Callable[[Run, Stage, Policy, ChatFormat, int], list[Callback]]
Watch = Callable[[TrainConfig], Watched]
# Opens loggers for the stages of a run, and gives them with a function that is told of each result.
Show = Callable[
    [TrainConfig, Run],
    AbstractContextManager[tuple[list[Logger], Callable[[str], None] | None]],
]


@runtime_checkable
class Shards(Protocol):
    """Weights split over the processes of a job, and checkpoints that are folders."""

    def strategy(self, processes: int) -> Strategy:
        """Lightning's strategy that splits them."""
        ...

    def split(self, model: Any, mesh: DeviceMesh) -> None:
        """Split a model's weights in place."""
        ...

    def write(self, checkpoint: dict[str, Any], folder: Path, module: nn.Module) -> None:
        """Write a checkpoint, whole or not at all; every process calls."""
        ...

    def read(self, checkpoint: Path, module: nn.Module) -> dict[str, Any]:
        """A folder's checkpoint, with tensors split as the module's weights are."""
        ...

    def alike(self, checkpoint: dict[str, Any], module: nn.Module) -> dict[str, Any]:
        """The checkpoint of one process, its tensors split as the module's weights are."""
        ...
