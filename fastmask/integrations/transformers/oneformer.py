"""transformers' OneFormer: losses at random points."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from fastmask.integrations.transformers._criteria import Auxiliary, PointLoss

LOSSES_OF_A_LAYER = 3


class OneFormerLoss(PointLoss):
    """The losses, by fastmask's kernels; transformers itself computes the contrastive one."""

    loss_shape = (1,)
    loss_contrastive: Callable[[Tensor, Tensor], dict[str, Tensor]]

    def all_losses(  # type: ignore[override]
        self,
        masks_queries_logits: Tensor,
        class_queries_logits: Tensor,
        contrastive_queries_logits: Tensor,
        mask_labels: Sequence[Tensor],
        class_labels: Sequence[Tensor],
        text_queries: Tensor,
        auxiliary_predictions: Auxiliary | None = None,
        calculate_contrastive_loss: bool = True,
    ) -> dict[str, Tensor]:
        """Unweighted losses under transformers' names, of all layers."""
        losses = self.named_losses(
            masks_queries_logits, class_queries_logits, mask_labels, class_labels, auxiliary_predictions
        )
        if not calculate_contrastive_loss:
            return losses
        last = dict(list(losses.items())[:LOSSES_OF_A_LAYER])
        return {**last, **self.loss_contrastive(contrastive_queries_logits, text_queries), **losses}
