"""Several metrics of a validation run, updated by the logits of each batch."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from fastmask.metrics.instance import InstanceMetrics
from fastmask.metrics.panoptic import PanopticMetrics
from fastmask.metrics.semantic import SemanticMetrics


class MetricsFromLogits:
    """Metrics that start anew for each validation run, in place of a list of everything that the model predicted.

    Args:
        metrics: by any name, such as {"semantic": SemanticMetrics(K)}; they stay as they are.
        options: by the same names, further arguments of their ``update_from_logits``, such as
            {"panoptic": {"threshold": 0.5}}.

    Raises:
        ValueError: options of metrics that are not there.
    """

    def __init__(
        self,
        metrics: Mapping[str, SemanticMetrics | PanopticMetrics | InstanceMetrics],
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self._options = dict(options or {})
        if unknown := sorted(set(self._options) - set(metrics)):
            raise ValueError(f"options names {', '.join(unknown)}; metrics has {', '.join(metrics) or 'none'}")
        self._initial = copy.deepcopy(dict(metrics))
        self.reset()

    def reset(self) -> None:
        """Forgets all batches."""
        self._metrics = copy.deepcopy(self._initial)

    def update(self, outputs: Any, targets: Any, sizes: Any = None, **arguments: Any) -> None:
        """Adds a batch to all metrics; the arguments are those that their ``update_from_logits`` share."""
        for name, metrics in self._metrics.items():
            metrics.update_from_logits(outputs, targets, sizes, **arguments, **self._options.get(name, {}))

    def compute(self) -> dict[str, float]:
        """The scores of all metrics by name, over all processes."""
        return {name: value for metrics in self._metrics.values() for name, value in metrics.synced().compute().items()}
