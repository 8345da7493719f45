"""Cross-attention in which a query attends where its own mask is foreground."""

from __future__ import annotations

from torch import Tensor

from fastmask.functional._backend import choose_backend
from fastmask.functional._checks import check_floating
from fastmask.ops.library import Operator

OPERATOR = Operator("masked_attention")


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask_logits: Tensor | None,
    *,
    grid: tuple[int, int],
    num_heads: int,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """softmax(scale q k^T + M) v, with M = 0 where the query's mask, resampled to the key grid, is >= 0, else -inf.

    Mask2Former (arXiv:2112.01527), equation 2. A query without any foreground attends everywhere; padded keys are
    never attended to; NaN mask logits are background. The mask is shared by all heads and carries no gradient.

    Args:
        q: ``(B, N, E)`` floating point, projected queries, heads side by side.
        k: ``(B, S, E)``, projected keys. v: ``(B, S, E)``, projected values.
        mask_logits: ``(B, N, h, w)``, the previous layer's masks at any resolution; None masks nothing.
        grid: (height, width) of the keys; height * width = S.
        num_heads: divides E.
        scale: (E / num_heads) ** -0.5 by default.
        key_padding_mask: ``(B, S)`` bool, True for keys that are padding.
        dropout_p: dropout of the attention weights.
        backend: "auto" or "reference".

    Returns:
        ``(B, N, E)`` in the dtype of ``q``; 0 for images whose keys are all padding.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: inputs that are not floating point.
        RuntimeError: the backend asked for cannot run.
    """
    for name, tensor, shape in (("q", q, "(B, N, E)"), ("k", k, "(B, S, E)"), ("v", v, "(B, S, E)")):
        check_floating(name, tensor, 3, shape)
    choose_backend(OPERATOR, backend, q)
    from fastmask import reference

    return reference.masked_attention(
        q,
        k,
        v,
        mask_logits,
        grid=grid,
        num_heads=num_heads,
        scale=scale,
        key_padding_mask=key_padding_mask,
        dropout_p=dropout_p,
    )
