"""Protocols of training's extensions, which `config.TrainTable` names."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lightning import Callback
from lightning.pytorch.strategies import Strategy
from torch import Size, nn

from dcr.core.config import Stage, TrainConfig
from dcr.core.data import Splits
from dcr.core.models import Policy
from dcr.core.prompts import ChatFormat
from dcr.core.runs import Run

# What is told of a run's rows in `rows.json`, and a line for each thing to warn of.
Examine = Callable[[Splits], tuple[Mapping[str, Any], list[str]]]
# The block whose states stage one should read, measured on the model before it trains.
FindLayer = Callable[[TrainConfig], int]
# Callbacks that measure while a stage of so many steps trains. Their prompts are read before.
Watched = Callable[[Run, Stage, Policy, ChatFormat, int], list[Callback]]
Watch = Callable[[TrainConfig], Watched]


@runtime_checkable
class Shards(Protocol):
    """Weights split over the processes of a job, and checkpoints that are folders."""

    def strategy(self, processes: int) -> Strategy:
        """Lightning's strategy that splits them."""
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

    def shapes(
        self, checkpoint: Path, module: nn.Module
    ) -> tuple[dict[str, Any], dict[str, Size], dict[str, Size]]:
        """The rest of a folder's checkpoint, the shape of each tensor, and what it should be."""
        ...
