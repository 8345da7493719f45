"""Predictions for images as files and pictures, and pages of results."""

from fastmask.extras import extra

with extra("data"):
    import PIL as PIL

from fastmask.prediction import page
from fastmask.prediction.evaluation_page import EvaluationPage
from fastmask.prediction.inputs import ImageFile, find_images
from fastmask.prediction.overlay import SegmentMap, draw_legend, draw_overlay, draw_segments
from fastmask.prediction.predict_images import PredictionReport, predict
from fastmask.prediction.sheets import contact_sheet, side_by_side

__all__ = [
    "EvaluationPage",
    "ImageFile",
    "PredictionReport",
    "SegmentMap",
    "contact_sheet",
    "draw_legend",
    "draw_overlay",
    "draw_segments",
    "find_images",
    "page",
    "predict",
    "side_by_side",
]
