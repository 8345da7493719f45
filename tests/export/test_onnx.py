"""ONNX files, run by onnxruntime."""

import json
import sys
from pathlib import Path

import pytest
import torch

from fastmask import __version__
from fastmask.export import OPSET, export_onnx, onnx_file
from fastmask.models import MaskFormer, Segmenter
from tests.helpers.exporting import (
    CLASSES,
    SIZE,
    TINY_RESNET50,
    TINY_SWIN,
    assert_same_labels,
    assert_same_scores,
    eomt,
    mask2former,
    maskformer,
    per_pixel,
    predicted_scores,
    segmenter,
    session,
    sound_detector,
    whole_images,
)

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


def run(path, inputs):
    """The outputs by name; ``path`` may be a session that is open already."""
    opened = session(path) if isinstance(path, Path) else path
    names = [output.name for output in opened.get_outputs()]
    results = opened.run(names, {opened.get_inputs()[0].name: inputs.numpy()})
    return {name: torch.from_numpy(result) for name, result in zip(names, results, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda: maskformer(masked_attention=True, decoder_layers=2),
        mask2former,
        lambda: maskformer(backbone="resnet", backbone_options=TINY_RESNET50, encoder_layers=1),
        lambda: maskformer(backbone="swin", backbone_options=TINY_SWIN),
        lambda: per_pixel(transformer_decoder=True),
        lambda: segmenter(decoder="linear", distilled=True),
    ],
)
def test_labels_of_any_number_of_images(make, tmp_path):
    model = make()
    opened = session(export_onnx(model, tmp_path / "model.onnx", size=SIZE))
    assert [value.shape for value in opened.get_outputs()] == [["batch", *SIZE]]
    for batch_size in (1, 3):
        images = torch.rand(batch_size, 3, *SIZE)
        assert_same_labels(run(opened, images)["labels"], model, images)


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["dinov2", "dinov3"])
@pytest.mark.parametrize("probabilities", [(1.0, 1.0), (0.0, 0.0)])
def test_an_eomts_labels(encoder, probabilities, tmp_path):
    model = eomt(encoder=encoder, mask_probabilities=probabilities)
    opened = session(export_onnx(model, tmp_path / "model.onnx", size=(64, 64)))
    for batch_size in (1, 3):
        images = torch.rand(batch_size, 3, 64, 64)
        assert_same_labels(run(opened, images)["labels"], model, images)


def slow(make):
    return pytest.param(make, marks=pytest.mark.slow)


NAMED = {"class_names": list("abcde")}


@pytest.mark.parametrize(
    "make",
    [
        lambda: per_pixel(**NAMED),
        slow(lambda: maskformer(backbone="tiny", stuff_classes=[4], **NAMED)),
        slow(lambda: maskformer(masked_attention=True, decoder_layers=3, **NAMED)),
        slow(lambda: mask2former(**NAMED)),
        slow(lambda: maskformer(backbone="efficientnet-lite0", **NAMED)),
        slow(segmenter),
    ],
)
@pytest.mark.slow
def test_images_of_any_size_and_number(make, tmp_path):
    """Smaller and larger than what was traced, odd sides, one pixel, and multiples, which need no padding."""
    model = make()
    path = export_onnx(model, tmp_path / "new" / "model.onnx")
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    opened = session(path)
    assert [(value.name, value.shape) for value in opened.get_inputs()] == [("images", ["batch", 3, "height", "width"])]
    assert [(value.name, value.shape) for value in opened.get_outputs()] == [("labels", ["batch", "height", "width"])]
    one_pixel = [] if isinstance(model, Segmenter) else [(2, 3, 1, 1)]  # its images are larger than a patch
    for shape in [(1, 3, 64, 96), (3, 3, 45, 70), *one_pixel, (1, 3, 31, 33), (1, 3, 200, 130)]:
        images = torch.rand(shape)
        assert_same_labels(run(opened, images)["labels"], model, images, **whole_images(model))

    proto = onnx.load(str(path))
    assert [(entry.domain, entry.version) for entry in proto.opset_import if not entry.domain] == [("", OPSET)]
    assert {node.domain for node in proto.graph.node} <= {""}
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    assert metadata["fastmask_version"] == __version__ and metadata["model"] == type(model).__name__
    assert json.loads(metadata["class_names"]) == list("abcde")
    if isinstance(model, MaskFormer):
        assert json.loads(metadata["stuff_classes"]) == list(model.config.stuff_classes)
    assert json.loads(metadata["pixel_mean"]) == list(model.config.pixel_mean)


@pytest.mark.slow
def test_logits_and_scores(tmp_path):
    model = maskformer()
    images = torch.rand(2, 3, *SIZE)
    outputs = run(export_onnx(model, tmp_path / "logits.onnx", task="logits", size=SIZE, batch_size=2), images)
    class_logits, mask_logits, _ = model.eval().final_logits(images)
    assert list(outputs) == ["class_logits", "mask_logits"]
    assert_same_scores(outputs["class_logits"], class_logits.detach())
    assert_same_scores(outputs["mask_logits"], mask_logits.detach())

    options = {"task": "scores", "size": SIZE, "batch_size": 2, "output_size": (64, 50)}
    scores = run(export_onnx(model, tmp_path / "scores.onnx", **options), images)["scores"]
    assert scores.shape == (2, CLASSES, 64, 50)
    assert_same_scores(scores, predicted_scores(model, images, (64, 50)))


@pytest.mark.slow
def test_clips_of_sound(tmp_path):
    """The short-time Fourier transform is an operator of ONNX."""
    model = sound_detector()
    path = export_onnx(model, tmp_path / "sound.onnx", size=8000)
    for batch_size in (1, 3):
        waveforms = torch.rand(batch_size, 8000) * 2 - 1
        outputs = run(path, waveforms)
        expected = model.predict(waveforms)
        for name in ("frame_probabilities", "clip_probabilities"):
            assert_same_scores(outputs[name], torch.stack([clip[name] for clip in expected]))


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_missing_packages_are_named_with_their_extra(package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}.*pip install 'fastmask-kernels\[export\]'"):
        export_onnx(maskformer(), tmp_path / "model.onnx")


def test_weights_beyond_what_a_file_holds_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(onnx_file, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="GB; an ONNX file holds 2 GB"):
        export_onnx(maskformer(), tmp_path / "model.onnx")


def test_an_interrupted_export_leaves_the_earlier_file(monkeypatch, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_text("kept")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx_file, "_convert", lambda *_: onnx.ModelProto())  # which takes its time
    monkeypatch.setattr(onnx.checker, "check_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(per_pixel(), path, size=SIZE, batch_size=1, overwrite=True)
    assert path.read_text() == "kept" and len(list(tmp_path.iterdir())) == 1
