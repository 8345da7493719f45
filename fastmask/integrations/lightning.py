"""Lightning: validation from logits, as a callback."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning

from fastmask.metrics import InstanceMetrics, MetricsFromLogits, PanopticMetrics, SemanticMetrics


def second_of_batch(batch: Any) -> dict[str, Any]:
    """The targets of batches of (images, targets)."""
    return {"targets": batch[1]}


class LogitMetricsCallback(lightning.Callback):
    """Computes metrics from what ``validation_step`` returns, a batch at a time, and logs them after each epoch.

    Neither predictions nor masks of the image's size are kept, so validation needs no more memory than one image's
    label maps. Scores are those of all processes together; with a sampler that repeats images, these count twice.

    Args:
        metrics, options: as for :class:`fastmask.metrics.MetricsFromLogits`.
        arguments: makes of a batch the arguments of ``update_from_logits``, such as {"targets": ..., "sizes": ...}. By
            default the targets are the second part of the batch.
        prefix: of the names in the log.
    """

    def __init__(
        self,
        metrics: Mapping[str, SemanticMetrics | PanopticMetrics | InstanceMetrics],
        options: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        arguments: Callable[[Any], Mapping[str, Any]] = second_of_batch,
        prefix: str = "",
    ) -> None:
        self._metrics = MetricsFromLogits(metrics, options)
        self._arguments, self._prefix = arguments, prefix

    def on_validation_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._metrics.reset()

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if outputs is None:
            raise TypeError("validation_step must return the model's outputs, got None")
        self._metrics.update(outputs, **self._arguments(batch))

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        scores = {self._prefix + name: value for name, value in self._metrics.compute().items()}
        pl_module.log_dict(scores, prog_bar=True)
        self._metrics.reset()
