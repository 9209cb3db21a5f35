"""A signal that stops training within a step, which may take minutes on a slow device."""

from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from dcr.core.models import structure
from dcr.core.training.resuming import Checkpoints, Interrupted, ResumableModule, ranks


class WithinStep(Callback):
    """Obeys a signal at the next block of the model, forwards or backwards.

    The step is left unfinished, with a checkpoint of the one before it, and so is a validation,
    without one. Several ranks, of which none may leave the others waiting, go on to the end of
    either, as `Checkpoints` does.
    """

    checkpoints: Checkpoints

    def __init__(self) -> None:
        self.begun: int | None = None  # steps that were done when this one was begun
        self.means: list[dict[str, Tensor]] = []  # of the epoch, at that time
        self.unfinished = False  # whether a step was left so
        self.watched: list[RemovableHandle] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        callbacks: list[Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        (self.checkpoints,) = (each for each in callbacks if isinstance(each, Checkpoints))
        if ranks() > 1:
            return

        def obey(*_: Any) -> None:
            if self.checkpoints.received is not None:
                self.unfinished = self.begun == trainer.global_step
                raise Interrupted(self.checkpoints.received)

        # no method: what measures on a copy of the model would copy this callback with it
        def enter(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            obey()
            hidden = args[0] if args else kwargs["hidden_states"]
            if hidden.requires_grad:
                hidden.register_hook(obey)  # when its gradient is there

        blocks = structure.decoder_blocks(pl_module.model)
        self.watched = [b.register_forward_pre_hook(enter, with_kwargs=True) for b in blocks]

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
    ) -> None:
        metrics = _metrics(pl_module)
        self.means = [{n: v.clone() for n, v in m.metric_state.items()} for m in metrics]
        self.begun = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._unwatch()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._unwatch()
        if self.unfinished and isinstance(exception, Interrupted):
            self._take_back(trainer, pl_module)
            try:
                self.checkpoints.save(trainer, due=True)
            finally:
                self.checkpoints.restore()

    def _take_back(self, trainer: Trainer, module: LightningModule) -> None:
        """Undo the counts of a step that is left unfinished; no weight has moved in it."""
        progress = trainer.fit_loop.epoch_loop.batch_progress
        progress.is_last_batch = False
        for count in (progress.total, progress.current):
            count.reset_on_restart()
        for metric, means in zip(_metrics(module), self.means, strict=True):
            for name, value in means.items():
                setattr(metric, name, value)

    def _unwatch(self) -> None:
        for hook in self.watched:
            hook.remove()


def _metrics(module: LightningModule) -> list[Any]:
    assert isinstance(module, ResumableModule)
    return [metric for _, metric in module.means()]
