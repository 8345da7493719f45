"""Drop-in ``nn.Module``s."""

from fastmask.modules.attention import MaskedCrossAttention
from fastmask.modules.criterion import LayerLosses, SetCriterion
from fastmask.modules.matcher import HungarianMatcher
from fastmask.modules.mlp import MLP
from fastmask.modules.pixel_decoder import PixelDecoder
from fastmask.modules.position_encoding import sine_position_encoding
from fastmask.modules.predictor import TransformerPredictor
from fastmask.modules.transformer import TransformerDecoder, TransformerEncoder

__all__ = [
    "MLP",
    "HungarianMatcher",
    "LayerLosses",
    "MaskedCrossAttention",
    "PixelDecoder",
    "SetCriterion",
    "TransformerDecoder",
    "TransformerEncoder",
    "TransformerPredictor",
    "sine_position_encoding",
]
