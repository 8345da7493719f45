"""Metrics that agree with the field's standard tools and can be summed over processes."""

from fastmask.metrics.from_logits import MetricsFromLogits
from fastmask.metrics.instance import InstanceMetrics
from fastmask.metrics.panoptic import PanopticMetrics
from fastmask.metrics.semantic import SemanticMetrics
from fastmask.metrics.sound import SoundEventMetrics

__all__ = ["InstanceMetrics", "MetricsFromLogits", "PanopticMetrics", "SemanticMetrics", "SoundEventMetrics"]
