"""Matchers, criterion, decoders and other building blocks of mask-classification networks, as ``nn.Module``s."""

from fastmask.modules.attention import MaskedCrossAttention
from fastmask.modules.criterion import LayerLosses, SetCriterion
from fastmask.modules.deformable_attention import MultiScaleDeformableAttention
from fastmask.modules.deformable_pixel_decoder import DeformablePixelDecoder
from fastmask.modules.final_predictions import FinalPredictions
from fastmask.modules.masked_predictor import MaskedTransformerPredictor
from fastmask.modules.matcher import FixedMatcher, HungarianMatcher, Matcher
from fastmask.modules.mlp import MLP
from fastmask.modules.pixel_decoder import PixelDecoder
from fastmask.modules.point_sampling import PointSampling
from fastmask.modules.position_encoding import sine_position_encoding
from fastmask.modules.predictions import Predictions
from fastmask.modules.predictor import TransformerPredictor
from fastmask.modules.transformer import TransformerDecoder, TransformerEncoder

__all__ = [
    "MLP",
    "DeformablePixelDecoder",
    "FinalPredictions",
    "FixedMatcher",
    "HungarianMatcher",
    "LayerLosses",
    "MaskedCrossAttention",
    "MaskedTransformerPredictor",
    "Matcher",
    "MultiScaleDeformableAttention",
    "PixelDecoder",
    "PointSampling",
    "Predictions",
    "SetCriterion",
    "TransformerDecoder",
    "TransformerEncoder",
    "TransformerPredictor",
    "sine_position_encoding",
]
