"""Weights split over the processes of a job (FSDP2), and the folder that is their checkpoint.

Each process writes its part. The whole is read on any number of processes, sharded or not, and
sharded ones read the file of one process.
Tensors lie in safetensors files and the rest in one that holds plain values, so that unlike
Lightning's own sharded checkpoints, or torch's, reading one runs no code of it.
"""

import functools
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dcr.core import storage
from dcr.core.models import structure
from dcr.core.training import resuming

REST = "rest.ckpt"  # of a checkpoint's folder: all but the tensors that are sharded
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, of each trainable weight
QUANTISED, EIGHT_BIT = "__bnb_optimizer_quant_state__", ("state1", "state2")  # bitsandbytes' own


class Sharded(ModelParallelStrategy):
    """FSDP2 over all processes, whose checkpoints go the way of every other strategy's."""

    def __init__(self, processes: int) -> None:
        super().__init__(data_parallel_size=processes, tensor_parallel_size=1)

    def setup_environment(self) -> None:
        super().setup_environment()
        # where Lightning lets a module split itself
        module: Any = self._weights
        mesh = self.device_mesh["data_parallel"]
        module.configure_model = functools.partial(split, module.model, mesh)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    lightning_module_state_dict = Strategy.lightning_module_state_dict
    load_model_state_dict = Strategy.load_model_state_dict
    load_optimizer_state_dict = Strategy.load_optimizer_state_dict
    optimizer_state = Strategy.optimizer_state

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        target = Path(filepath)
        with resuming.saving(target):
            write(checkpoint, target, self._weights)  # by all ranks

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        found = Strategy.load_checkpoint(self, checkpoint_path, weights_only)
        return found if Path(checkpoint_path).is_dir() else alike(found, self._weights)

    @property
    def _weights(self) -> nn.Module:
        assert self.lightning_module is not None
        return self.lightning_module


def split(model: Any, mesh: DeviceMesh) -> None:
    """Splits every block, and an untied embedding and head, over the mesh (FSDP2).

    The other weights, such as a tied matrix and the final norm, are frozen (`freeze_beyond`, LoRA)
    and stay whole on every device.
    """
    embeddings, output = model.get_input_embeddings(), structure.head(model)
    owner = structure.backbone(model)
    untied = [] if output.weight is embeddings.weight else [embeddings, output]
    for module in (*structure.decoder_blocks(model), *untied):
        fully_shard(module, mesh=mesh)
    whole_weights = {weight for weight in owner.parameters() if not isinstance(weight, DTensor)}
    # sharding the root lets one block's gathering overlap the computation of the previous block
    fully_shard(owner, mesh=mesh, ignored_params=whole_weights)


def homes(
    checkpoint: dict[str, Any], module: nn.Module
) -> Iterator[tuple[str, dict[Any, Any], Any, Tensor]]:
    """Each tensor that may be sharded: its name in files, its dict and key, and its weight."""
    (optimizer,) = checkpoint["optimizer_states"]
    weights = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    for number, (name, weight) in enumerate(weights):
        yield name, checkpoint["state_dict"], name, weight.detach()
        state = optimizer["state"][number]
        state = state.get(QUANTISED, state)
        # a folder's `rest.ckpt` holds no moments, so neither name is in it yet
        for moment, key in zip(
            MOMENTS, EIGHT_BIT if EIGHT_BIT[0] in state else MOMENTS, strict=True
        ):
            yield f"{moment}/{name}", state, key, weight.detach()


def write(checkpoint: dict[str, Any], folder: Path, module: nn.Module) -> None:
    """A checkpoint as a folder with checksums, whole or not at all; every process calls.

    Raises UserError or RuntimeError, on all of them alike, when it cannot be written.
    """
    (optimizer,) = checkpoint["optimizer_states"]
    state = {number: dict(moments) for number, moments in optimizer["state"].items()}
    rest = checkpoint | {
        "state_dict": dict(checkpoint["state_dict"]),
        "optimizer_states": [optimizer | {"state": state}],
    }
    tensors = {named: home.pop(key) for named, home, key, _ in homes(rest, module)}
    with ExitStack() as stack:
        staging, fault = None, None
        try:
            if dist.get_rank() == 0:
                staging = stack.enter_context(storage.replaced_folder(folder))
                torch.save(rest, staging / REST)
        except Exception as error:
            fault = error
        places: list[Any] = [str(staging) if fault is None else None]
        dist.broadcast_object_list(places)
        if places[0] is None:
            raise fault or RuntimeError("rank 0 could not write")
        try:
            save(tensors, storage_writer=HuggingFaceStorageWriter(places[0], save_distributed=True))
        except CheckpointException as error:  # a BaseException
            raise RuntimeError(str(next(iter(error.failures.values()))[0])) from error
        if staging is not None:
            storage.write_checksums(staging)


def read(folder: Path, module: nn.Module) -> dict[str, Any]:
    """A checkpoint's folder, with whole tensors or those shards that the module's weights have."""
    whole = torch.load(folder / REST, map_location="cpu", weights_only=True)
    places = list(homes(whole, module))
    tensors = {named: torch.empty_like(weight) for named, _, _, weight in places}
    with warnings.catch_warnings():  # that each process reads what it needs, without the others
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled")
        reader = HuggingFaceStorageReader(str(folder))
        load(tensors, storage_reader=reader, no_dist=True)
    for named, home, key, _ in places:
        home[key] = tensors[named]
    return whole


def alike(checkpoint: dict[str, Any], module: nn.Module) -> dict[str, Any]:
    """A whole checkpoint, its tensors sharded as the module's weights are."""
    for _, home, key, weight in homes(checkpoint, module):
        if isinstance(weight, DTensor):
            home[key] = distribute_tensor(
                home[key].to(weight.device),
                weight.device_mesh,
                weight.placements,
                src_data_rank=None,
            )
    return checkpoint
