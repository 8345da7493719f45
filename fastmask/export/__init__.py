"""Exports networks as programs that run without their Python code: ``torch.export`` and ONNX.

A program holds the network's weights in float32, in evaluation mode, and all steps from images to results:
normalization, padding, and resizing to the image's size. Its inputs and outputs depend on the task:

======== ====================== ======================================================================================
task     inputs                 outputs
======== ====================== ======================================================================================
semantic images (B, C, H, W)    labels (B, H, W), as ``model.predict(images)`` gives them
scores   images (B, C, H, W)    scores (B, K, H, W) float32, as ``model.predict(images, output="scores")`` does
logits   images (B, C, H, W)    MaskFormer: class_logits (B, N, K+1) and mask_logits (B, N, h, w), which cover the
                                padded image, for panoptic or instance post-processing outside; others: logits
                                (B, K, h, w), likewise
events   waveforms (B, S)       frame_probabilities (B, K, T) and clip_probabilities (B, K)
======== ====================== ======================================================================================

Images are float32 in 0..1, waveforms float32 at the network's sample rate.

A Segmenter predicts in windows. If the ``size`` of the images is given, so does its program, with all windows at once.
Without a ``size`` the number of windows is unknown, so the program predicts whole images, as the task "logits" always
does: 6% to 65% of the labels then differ from those of ``predict``, but not from ``predict(window=0)``. A warning says
so, and "window" in the file's metadata gives the windows of a program that has them.

An EoMT's program predicts images at their own size, where ``predict`` resizes them to ``image_size`` and takes windows:
both give the same for images of ``image_size`` x ``image_size`` pixels. For labels and scores of others, a warning says
so.

A MaskFormer's portable program holds the mask logits of N queries at the size of the image, N * H * W floats per image,
whereas fastmask's kernels hold one strip of them; ``portable=False`` keeps the kernels.
"""

from fastmask.export.onnx_file import OPSET, export_onnx
from fastmask.export.program import export_program, export_pt2
from fastmask.export.task_module import EXPORTED_TASKS

__all__ = ["EXPORTED_TASKS", "OPSET", "export_onnx", "export_program", "export_pt2"]
