"""Turns waveforms into features of short time frames."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmask.extras import extra
from fastmask.modules.position_encoding import sine_position_encoding
from fastmask.modules.transformer import TransformerEncoder

MIN_POWER = 1e-6


class LogMel(nn.Module):
    """The log mel spectrogram: the base-10 logarithm of the power in mel bands, for each window.

    Args:
        sample_rate: samples per second.
        num_mels: the number of mel bands between 0 Hz and half the sample rate.
        window: the length of the Hann window and of the Fourier transform, in samples.
        hop: samples from the start of one window to the next.
    """

    filters: Tensor
    window: Tensor

    def __init__(self, sample_rate: int, num_mels: int, window: int, hop: int) -> None:
        super().__init__()
        with extra("models"):
            from transformers.audio_utils import mel_filter_bank

        bank = mel_filter_bank(window // 2 + 1, num_mels, 0.0, sample_rate / 2, sample_rate, "slaney", "slaney")
        self.hop = hop
        self.register_buffer("filters", torch.from_numpy(bank.T).float(), persistent=False)
        self.register_buffer("window", torch.hann_window(window), persistent=False)

    def forward(self, waveforms: Tensor) -> Tensor:
        """``(B, S)`` samples to ``(B, num_mels, S // hop)``, in the dtype of the module."""
        # cuFFT does not support bfloat16, and the power would overflow in float16.
        with torch.autocast(waveforms.device.type, enabled=False):
            spectrum = torch.stft(
                waveforms.float(),
                len(self.window),
                self.hop,
                window=self.window.float(),
                return_complex=True,
                pad_mode="constant",
            )
            power = spectrum.real.square() + spectrum.imag.square()
            mel = (self.filters.float() @ power).clamp(min=MIN_POWER).log10()
        return mel[..., : waveforms.shape[-1] // self.hop].to(self.filters.dtype)


class FrameEncoder(nn.Module):
    """A convolutional network over time and frequency, then a transformer encoder over time.

    Each block halves the frequency axis; the first blocks also halve the time axis, until ``time_stride`` is reached.

    Args:
        num_mels: mel bands of the input.
        channels: output channels of each block.
        dim: channels of the result.
        time_stride: windows per frame, a power of two, at most 2^(number of blocks).
        encoder_layers: transformer layers; 0 for no transformer.
        num_heads, feedforward_dim, dropout: as for ``TransformerEncoder``.
    """

    def __init__(
        self,
        num_mels: int,
        channels: tuple[int, ...],
        dim: int,
        time_stride: int,
        *,
        encoder_layers: int,
        num_heads: int,
        feedforward_dim: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.input_norm = nn.BatchNorm1d(num_mels)
        blocks = []
        input_dim, stride = 1, 1
        for width in channels:
            step = 2 if stride < time_stride else 1
            stride *= step
            blocks.append(
                nn.Sequential(
                    nn.Conv2d(input_dim, width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                    nn.AvgPool2d((2, step), ceil_mode=True),
                )
            )
            input_dim = width
        self.blocks = nn.Sequential(*blocks)
        self.projection = nn.Linear(input_dim, dim)
        self.encoder = TransformerEncoder(encoder_layers, dim, num_heads, feedforward_dim, dropout)

    def forward(self, mel: Tensor) -> Tensor:
        """``(B, num_mels, T)`` to ``(B, dim, T / time_stride)``, rounded up."""
        maps = self.blocks(self.input_norm(mel)[:, None])
        tokens = self.projection(maps.mean(2).transpose(1, 2))
        position = sine_position_encoding(1, *tokens.shape[1:], dtype=tokens.dtype, device=tokens.device)
        return self.encoder(tokens, position).transpose(1, 2)


def linear_softmax(probabilities: Tensor) -> Tensor:
    """``(..., T)`` to ``(...)``: the mean over frames, each weighted by its own probability, sum y^2 / sum y.

    Wang, Li and Metze, arXiv:1810.09050, table 1 ("linear softmax"). The most probable frames dominate, and every frame
    gets a gradient.
    """
    return probabilities.square().sum(-1) / probabilities.sum(-1).clamp(min=torch.finfo(probabilities.dtype).tiny)


def median_filter(active: Tensor, frames: int) -> Tensor:
    """``(..., T)`` bool: the majority of the ``frames`` (odd) around each frame; silence lies beyond the ends."""
    windows = F.pad(active, (frames // 2, frames // 2)).unfold(-1, frames, 1)
    return 2 * windows.sum(-1) > frames
