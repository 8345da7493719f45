"""The label map of a large image: the memory of the usual code, of fastmask's operator, and of prediction in windows.

The usual code upsamples N masks to the image and makes K score maps. ``semantic_inference`` makes the same labels a
band of rows at a time, and ``SemanticMetrics`` counts them likewise. Windows bound the memory of the network as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

import fastmask
from fastmask.measure import peak_memory
from fastmask.metrics import SemanticMetrics


def usual(class_logits: Tensor, mask_logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Semantic inference as the original repository writes it."""
    masks = interpolate(mask_logits, size=size, mode="bilinear", align_corners=False).sigmoid()
    scores = torch.einsum("bnk,bnhw->bkhw", class_logits.softmax(-1)[..., :-1], masks)
    return scores.argmax(1)


def report(name: str, call: Callable[[], Any]) -> Any:
    result, memory = peak_memory(call, torch.device("cpu"))
    print(f"{name:<28}{max(size or 0 for size in memory.values()) / 1e6:10.0f} MB")
    return result


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 1536), metavar=("H", "W"), help="of the image")
    parser.add_argument("--window", type=int, default=512, help="side of the windows, in pixels")
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--checkpoint", help="folder of a saved MaskFormer")
    options = parser.parse_args()

    torch.manual_seed(0)
    size = tuple(options.size)
    if options.checkpoint is not None:
        model = fastmask.MaskFormer.from_pretrained(options.checkpoint)
    else:
        model = fastmask.MaskFormer(fastmask.MaskFormerConfig.preset("tiny", options.classes, num_queries=100))
    image = torch.rand(1, 3, *size)
    outputs = model.eval()(image)
    logits = outputs["pred_logits"], outputs["pred_masks"]

    print(f"{size[0]} x {size[1]} pixels, {logits[0].shape[1]} queries, {logits[0].shape[2] - 1} classes")
    print("from logits to labels:")
    expected = report("  the usual code", lambda: usual(*logits, size))
    labels = report("  semantic_inference", lambda: fastmask.semantic_inference(*logits, size))
    print(f"  equal labels: {100 * (labels == expected).float().mean().item():.3f} %")
    print("from logits to mIoU:")
    metrics = [SemanticMetrics(logits[0].shape[2] - 1, boundary_share=None) for _ in range(2)]
    truth = expected.clone()
    truth[:, ::3] = (truth[:, ::3] + 1) % metrics[0].num_classes
    report("  the usual code", lambda: metrics[0].update(usual(*logits, size), truth))
    report("  update_from_logits", lambda: metrics[1].update_from_logits(outputs, truth))
    print("  mIoU: " + " and ".join(f"{100 * one.compute()['mIoU']:.3f} %" for one in metrics))
    print("from the image to labels:")
    report("  predict", lambda: model.predict(image)[0])
    report("  predict in windows", lambda: model.predict(image, window=(options.window, options.window))[0])


if __name__ == "__main__":
    main()
