"""What an installed wheel, or a kernel from the hub, must do: every operator, in C++, against the reference."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import torch


def check(fastmask: ModuleType) -> None:
    torch.manual_seed(0)
    class_logits, mask_logits = torch.randn(2, 10, 6), torch.randn(2, 10, 16, 16, requires_grad=True)
    targets = fastmask.Targets.from_segmentation(torch.randint(0, 5, (2, 64, 64)), 5)
    q, k = torch.randn(2, 10, 32), torch.randn(2, 64, 32)
    locations, weights = torch.rand(2, 10, 4, 1, 3, 2), torch.rand(2, 10, 4, 1, 3)

    def everything(backend: str) -> dict[str, torch.Tensor]:
        cost = fastmask.mask_cost(class_logits, mask_logits, targets, backend=backend)
        assignment = fastmask.assign(cost, targets.counts, backend=backend)
        losses = fastmask.mask_loss(mask_logits, targets, assignment, backend=backend)
        (gradient,) = torch.autograd.grad(sum(losses), mask_logits)
        attended = fastmask.masked_attention(q, k, k, mask_logits, grid=(8, 8), num_heads=4, backend=backend)
        sampled = fastmask.deformable_attention(k.view(2, 64, 4, 8), [(8, 8)], locations, weights, backend=backend)
        scores = fastmask.semantic_inference(class_logits, mask_logits, (64, 64), output="scores", backend=backend)
        segments = [
            segmentation.float()
            for segmentation, _ in fastmask.panoptic_inference(
                class_logits, mask_logits, (64, 64), threshold=0.3, backend=backend
            )
        ]
        masks = fastmask.instance_inference(class_logits, mask_logits, (64, 64), backend=backend)[0]["masks"].float()
        return {
            "mask_cost": cost,
            "assign": assignment.float(),
            "mask_loss": torch.stack(losses),
            "gradient of mask_loss": gradient,
            "masked_attention": attended,
            "deformable_attention": sampled,
            "semantic_inference": scores,
            "panoptic_inference": torch.stack(segments),
            "instance_inference": masks,
        }

    fastmask.show_config()
    print("from", Path(fastmask.__file__).parent)
    expected = everything("reference")
    for name, value in everything("native").items():
        # Single pixels on the border between two queries may go either way.
        wrong = ((value - expected[name]).abs() > 1e-4 + 1e-4 * expected[name].abs()).float().mean().item()
        print(f"{name:<24}{100 * (1 - wrong):8.3f} % equal to the reference")
        if wrong > 1e-3:
            raise SystemExit(f"{name} is wrong")


if __name__ == "__main__":
    import fastmask
    import fastmask.kernels

    check(fastmask)
