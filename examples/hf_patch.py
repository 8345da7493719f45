"""Makes a MaskFormer of transformers faster in place, and compares loss, gradients and time before and after. A third
way hands the patched model one map an image instead of a mask for each object.

By default a small network with random weights; ``--checkpoint facebook/maskformer-swin-tiny-ade`` (or a folder) takes
a real one.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MaskFormerConfig, MaskFormerForInstanceSegmentation, ResNetConfig

import fastmask
from fastmask.data import CLASS_NAMES, ComposedScenes
from fastmask.integrations.transformers import collate_segmentation, segmentation_targets

STAGES = ["stage1", "stage2", "stage3", "stage4"]


def make_model(checkpoint: str | None) -> MaskFormerForInstanceSegmentation:
    if checkpoint is not None:
        return MaskFormerForInstanceSegmentation.from_pretrained(checkpoint)
    backbone = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 64, 64], depths=[1, 1, 1, 1], out_features=STAGES)
    decoder = {"model_type": "detr", "d_model": 64, "num_queries": 50, "dropout": 0.0}
    for part in ("encoder", "decoder"):
        decoder |= {f"{part}_layers": 3, f"{part}_attention_heads": 4, f"{part}_ffn_dim": 128}
    config = MaskFormerConfig(
        num_labels=len(CLASS_NAMES),
        fpn_feature_size=64,
        mask_feature_size=64,
        backbone_config=backbone,
        decoder_config=decoder,
        use_auxiliary_loss=True,
        output_hidden_states=True,  # transformers' auxiliary losses need them
    )
    return MaskFormerForInstanceSegmentation(config)


def make_batches(images: int, size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scenes in both forms of labels: maps, and the binary masks that transformers takes."""
    scenes = [ComposedScenes("train", size=(size, size))[i] for i in range(images)]
    examples = []
    for scene in scenes:
        classes = dict(enumerate(scene.labels.tolist()))  # of each segment
        labels = segmentation_targets(scene.segments, classes, ignore_index=-1)
        examples.append({"pixel_values": scene.image, **labels})
    maps = collate_segmentation(examples)
    masks = [
        (segments == torch.arange(len(labels))[:, None, None]).float()
        for segments, labels in zip(maps["mask_labels"], maps["class_labels"], strict=True)
    ]
    return maps, {**maps, "mask_labels": masks}


def step(model: nn.Module, batch: dict[str, Any]) -> tuple[float, list[Tensor], float]:
    """The loss of one training step, its gradients, and its seconds."""
    model.zero_grad()
    start = time.perf_counter()
    loss = model(**batch).loss
    loss.backward()
    seconds = time.perf_counter() - start
    return loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None], seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="hub id or folder of a MaskFormer")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--size", type=int, default=256, help="height and width of the images, in pixels")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps; the fastest counts")
    options = parser.parse_args()

    torch.manual_seed(0)
    model = make_model(options.checkpoint).eval()  # without dropout, so that both ways compute the same
    maps, masks = make_batches(options.images, options.size)

    ways = {
        "transformers": (fastmask.unpatch, masks),
        "fastmask": (fastmask.patch, masks),
        "with maps": (fastmask.patch, maps),
    }
    results = {}
    for name, (change, batch) in ways.items():
        change(model)
        steps = [step(model, batch) for _ in range(options.rounds)]
        results[name] = steps[0]
        held = sum(labels.nbytes for labels in batch["mask_labels"]) / 1e6
        milliseconds = 1000 * min(seconds for *_, seconds in steps)
        print(f"{name:>12}: loss {steps[0][0]:.6f}, {milliseconds:.0f} ms a step, labels of {held:.1f} MB")

    before, after = (torch.cat([g.flatten() for g in results[name][1]]) for name in ("transformers", "fastmask"))
    print(f"difference of the gradients: {((after - before).norm() / before.norm()).item():.1e} of their norm")


if __name__ == "__main__":
    main()
