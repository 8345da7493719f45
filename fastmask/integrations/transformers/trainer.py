"""transformers' Trainer: validation from logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastmask.metrics import InstanceMetrics, MetricsFromLogits, PanopticMetrics, SemanticMetrics


def targets_of_labels(labels: Any) -> Any:
    """The targets in the labels of a batch: a list with a mapping for each image, or "mask_labels" and "class_labels"
    in this order."""
    if isinstance(labels, tuple):
        masks, classes = labels
        return [{"masks": m, "labels": c} for m, c in zip(masks, classes, strict=True)]
    return labels


class TrainerMetrics:
    """Computes metrics a batch at a time, so that the Trainer gathers no logits.

    Pass both methods to the Trainer, and set ``batch_eval_metrics=True`` in its arguments: otherwise it keeps all
    labels until the end. The size of the results is that of the labels. With several processes, set
    ``accelerator_config={"even_batches": False}``, too, so that no image counts twice.

    Args:
        model: the model that the Trainer evaluates; a forward hook reads its outputs.
        metrics, options: as for :class:`fastmask.metrics.MetricsFromLogits`.
        targets: makes of a batch's labels the ``targets`` of ``update_from_logits``. By default these are a list of
            {"class_labels", "masks"}, or "mask_labels" and "class_labels".
    """

    def __init__(
        self,
        model: nn.Module,
        metrics: Mapping[str, SemanticMetrics | PanopticMetrics | InstanceMetrics],
        options: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        targets: Callable[[Any], Any] = targets_of_labels,
    ) -> None:
        self._metrics = MetricsFromLogits(metrics, options)
        self._targets = targets
        self._outputs: Any = None
        self._device = torch.device("cpu")
        model.register_forward_hook(self._remember)

    def _remember(self, model: nn.Module, inputs: Any, outputs: Any) -> None:
        self._outputs = None if model.training else outputs
        self._device = next(model.parameters()).device

    def preprocess_logits_for_metrics(self, logits: Any, labels: Any) -> Tensor:
        """Adds a batch. The Trainer drops the names of the outputs, which the hook has kept; the result stands for the
        logits that it would gather.

        Raises:
            RuntimeError: the model has not run in evaluation mode since the last batch.
        """
        outputs, self._outputs = self._outputs, None
        if outputs is None:
            raise RuntimeError(
                "the model has not run in evaluation mode; expected the model that the Trainer evaluates"
            )
        self._metrics.update(outputs, self._targets(labels))
        return torch.zeros(1, device=self._device)

    def compute_metrics(self, prediction: Any, compute_result: bool = True) -> dict[str, float]:
        """The scores of all batches since the last result, over all processes; nothing before ``compute_result``."""
        if not compute_result:
            return {}
        scores = self._metrics.compute()
        self._metrics.reset()
        return scores
