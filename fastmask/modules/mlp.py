"""The MLP that turns a query into its mask embedding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """``num_layers`` linear layers with an activation between them, on the last dimension.

    Args:
        input_dim: channels of the input.
        hidden_dim: channels between the layers.
        output_dim: channels of the result.
        num_layers: number of linear layers, at least 1.
        activation: the function between the layers.

    Raises:
        ValueError: ``num_layers`` below 1.
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        output_dim: int,
        num_layers: int,
        activation: Callable[[Tensor], Tensor] = torch.relu,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        self.activation = activation
        widths = [input_dim, *[hidden_dim] * (num_layers - 1), output_dim]
        self.layers = nn.ModuleList(nn.Linear(widths[i], widths[i + 1]) for i in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        """``(..., input_dim)`` to ``(..., output_dim)``."""
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)
