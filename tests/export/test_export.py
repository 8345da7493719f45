"""Programs of torch.export: what they compute, what they leave open, and what they refuse."""

import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from fastmask import __version__
from fastmask.cli.main import app
from fastmask.export import export_onnx, export_program, export_pt2
from fastmask.functional import panoptic_inference, semantic_inference
from tests.helpers.exporting import (
    CLASSES,
    SIZE,
    TINY_SWIN,
    assert_same_labels,
    assert_same_scores,
    eomt,
    exported,
    mask2former,
    maskformer,
    own_operators,
    per_pixel,
    predicted_scores,
    segmenter,
    sound_detector,
)


def masked_attention():
    return maskformer(masked_attention=True, encoder_layers=0)


def with_encoder():
    return maskformer(encoder_layers=1)


@pytest.mark.parametrize("portable", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize("make", [pytest.param(with_encoder, marks=pytest.mark.slow), masked_attention, mask2former])
def test_a_maskformers_labels(make, portable):
    model, program = exported(make, portable=portable)
    expected = set() if portable else {"fastmask.masked_attention.default", "fastmask.semantic_inference.default"}
    if make is mask2former and not portable:
        expected.add("fastmask.deformable_attention.default")
    assert own_operators(program) == expected
    images = torch.rand(2, 3, *SIZE)
    assert_same_labels(program.module()(images)["labels"], model, images)


@pytest.mark.parametrize(
    "make",
    [
        per_pixel,
        lambda: per_pixel(transformer_decoder=True),
        segmenter,
        lambda: segmenter(decoder="linear", distilled=True),
    ],
)
def test_labels_and_scores_of_networks_without_masks(make):
    images = torch.rand(2, 3, *SIZE)
    model, program = exported(make)
    assert_same_labels(program.module()(images)["labels"], model, images)
    model, program = exported(make, task="scores", output_size=(64, 50))
    assert_same_scores(program.module()(images)["scores"], predicted_scores(model, images, (64, 50)))


@pytest.mark.slow
@pytest.mark.parametrize("probabilities", [(1.0, 1.0), (0.0, 0.0)])
@pytest.mark.parametrize("encoder", ["dinov2", "dinov3"])
def test_an_eomts_labels_with_and_without_masks(encoder, probabilities):
    """At the size of a window; an image of another size is predicted whole."""
    torch.manual_seed(0)
    model = eomt(encoder=encoder, mask_probabilities=probabilities)
    images = torch.rand(2, 3, 64, 64)
    for portable in (True, False):
        program = export_program(model, size=(64, 64), portable=portable)
        masks = {"fastmask.masked_attention.default"} if probabilities[0] else set()
        assert own_operators(program) == (set() if portable else {*masks, "fastmask.semantic_inference.default"})
        assert_same_labels(program.module()(images)["labels"], model, images)
    with pytest.warns(UserWarning, match="at their own size, .* windows of 64 pixels"):
        program = export_program(model, batch_size=1)
    wide = torch.rand(1, 3, 45, 70)
    with torch.no_grad():
        classes, masks, padded = model.eval().final_logits(wide)
    steps = {"padded_size": padded, "valid_size": (45, 70)}
    assert torch.equal(program.module()(wide)["labels"], semantic_inference(classes, masks, (45, 70), **steps))


def test_a_result_of_another_size_than_the_images():
    model, program = exported(maskformer, output_size=(64, 50))
    images = torch.rand(2, 3, *SIZE)
    assert_same_labels(program.module()(images)["labels"], model, images, (64, 50))


def test_panoptic_segmentation_of_exported_logits():
    """The post-processing that the program leaves out gives what ``predict`` gives."""
    model = maskformer(stuff_classes=[3, 4])
    images = torch.rand(2, 3, *SIZE)
    outputs = export_program(model, task="logits", size=SIZE, batch_size=2).module()(images)
    assert outputs["class_logits"].shape == (2, 7, CLASSES + 1) and outputs["mask_logits"].shape == (2, 7, 16, 24)
    steps = {"padded_size": (64, 96), "valid_size": SIZE}
    options = {"threshold": 0.0, "overlap_threshold": 0.0, "stuff_classes": (3, 4)}
    results = panoptic_inference(outputs["class_logits"], outputs["mask_logits"], SIZE, **options, **steps)
    predicted = model.predict(images, "panoptic", **options)
    for (actual, actual_info), (expected, info) in zip(results, predicted, strict=True):
        assert info and [x["category_id"] for x in actual_info] == [x["category_id"] for x in info]
        assert float((actual == expected).float().mean()) > 0.999


@pytest.mark.slow
def test_clips_of_sound():
    model = sound_detector()
    program = export_program(model, size=8000)
    for batch_size in (1, 3):
        waveforms = torch.rand(batch_size, 8000) * 2 - 1
        outputs = program.module()(waveforms)
        expected = model.predict(waveforms)
        for name in ("frame_probabilities", "clip_probabilities"):
            assert_same_scores(outputs[name], torch.stack([clip[name] for clip in expected]))


def test_the_network_stays_as_it_is():
    model = maskformer().train()
    model.backbone.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export_program(model, size=SIZE, batch_size=1, portable=False)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(layer.multihead_attn.backend == "auto" for layer in model.predictor.decoder.layers)


def test_a_network_of_bfloat16_is_exported_in_float32():
    model = maskformer().to(torch.bfloat16)
    program = export_program(model, size=SIZE, batch_size=1)
    assert {value.dtype for value in program.state_dict.values() if value.is_floating_point()} == {torch.float32}
    images = torch.rand(1, 3, *SIZE)
    assert_same_labels(program.module()(images)["labels"], model.float(), images)
    assert next(model.parameters()).dtype == torch.float32


LOADING = """
import sys, torch
{imports}
program = torch.export.load(sys.argv[1], extra_files=(extra := {{"fastmask.json": ""}}))
images = torch.load(sys.argv[2])
torch.save((program.module()(images)["labels"], extra), sys.argv[3])
assert ("fastmask" in sys.modules) == {expected}
"""


@pytest.mark.slow
@pytest.mark.parametrize("portable", [True, False])
def test_the_command_exports_a_saved_network_for_a_process_of_its_own(portable, tmp_path):
    """Without fastmask if it is portable."""
    model = maskformer(backbone="tiny", class_names=list("abcde"))
    model.save_pretrained(tmp_path / "saved")
    path = tmp_path / "out" / "model.pt2"
    arguments = ["export", str(tmp_path / "saved"), str(path), "--size", "45", "70", "--batch", "3"]
    result = CliRunner().invoke(app, arguments + ["--kernels"] * (not portable), catch_exceptions=False)
    assert result.exit_code == 0 and "model.pt2" in result.output
    assert [file.name for file in path.parent.iterdir()] == ["model.pt2"]
    with pytest.raises(FileExistsError):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    images = torch.rand(3, 3, *SIZE)
    torch.save(images, tmp_path / "images.pt")
    code = LOADING.format(imports="" if portable else "import fastmask", expected=not portable)
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "images.pt"), str(tmp_path / "labels.pt")]
    subprocess.run(command, check=True)
    labels, extra = torch.load(tmp_path / "labels.pt")
    assert_same_labels(labels, model, images)
    metadata = json.loads(extra["fastmask.json"])
    assert metadata["fastmask_version"] == __version__ and metadata["task"] == "semantic"
    assert json.loads(metadata["class_names"]) == list("abcde")


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (lambda: torch.nn.Linear(1, 1), {}, TypeError, "network of fastmask.models, got Linear"),
        (maskformer, {"task": "events"}, ValueError, "task of a MaskFormer must be one of semantic, scores, logits"),
        (sound_detector, {"task": "semantic"}, ValueError, "must be one of events, got 'semantic'"),
        (maskformer, {"size": 64}, TypeError, r"size must be \(height, width\) or None, got 64"),
        (maskformer, {"size": (64, 0)}, ValueError, r"at least 1, got \(64, 0\)"),
        (maskformer, {"size": (64, 64, 64)}, ValueError, "size must be"),
        (maskformer, {"batch_size": 0}, ValueError, "batch_size must be an integer, at least 1, got 0"),
        (maskformer, {"output_size": (64, 64)}, ValueError, "output_size goes with a size"),
        (maskformer, {"output_size": (9, 9), "size": (9, 9), "task": "logits"}, ValueError, "labels or scores"),
        (sound_detector, {"size": (1, 8000)}, TypeError, "size must be an integer"),
        (sound_detector, {}, ValueError, "any number of clips or for clips of any length, not both"),
        (
            lambda: maskformer(backbone="swin", backbone_options=TINY_SWIN),
            {},
            ValueError,
            r"backbone 'swin' .* one size only.*give size=\(height, width\)",
        ),
    ],
)
def test_what_cannot_be_exported_is_named(make, options, error, message):
    with pytest.raises(error, match=message):
        export_program(make(), **options)


def test_kernels_that_are_missing_are_not_replaced(monkeypatch):
    from fastmask.ops import _registry

    monkeypatch.setattr(_registry, "EXTENSION_ERROR", "libfastmask.so was not built")
    with pytest.raises(RuntimeError, match="was not built"):
        export_program(maskformer(), size=SIZE, portable=False)


def test_files_are_not_overwritten_unasked(tmp_path):
    model = maskformer()
    path = tmp_path / "model.pt2"
    path.write_text("kept")
    with pytest.raises(FileExistsError, match=r"model\.pt2 exists"):
        export_pt2(model, path)
    with pytest.raises(ValueError, match=r"must end with \.onnx, got .*model\.pt2"):
        export_onnx(model, path)
    with pytest.raises(ValueError, match="task of a MaskFormer"):
        export_pt2(model, path, overwrite=True, task="events")
    assert path.read_text() == "kept" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        ("model.bin", [], "must end with .onnx or .pt2"),
        ("model.onnx", ["--kernels"], "an ONNX file holds standard operators only"),
        ("model.onnx", ["--size", "64", "64", "--samples", "8000"], "give one of them"),
    ],
)
def test_the_command_refuses_options_that_do_not_fit(output, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        CliRunner().invoke(app, ["export", str(tmp_path), str(tmp_path / output), *options], catch_exceptions=False)
