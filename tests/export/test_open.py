"""Programs for images of any size and number, and what torch.compile makes of the same way from images to labels."""

import pytest
import torch

from fastmask.export import export_program
from fastmask.export.task_module import ImageTask
from fastmask.models import MaskFormer, MaskFormerConfig
from tests.helpers.exporting import (
    CLASSES,
    SIZE,
    TINY,
    assert_same_labels,
    assert_same_scores,
    exported,
    mask2former,
    maskformer,
    own_operators,
    portable_or_not,
    segmenter,
    whole_images,
)


@portable_or_not
@pytest.mark.slow
def test_images_of_any_size_and_number(portable):
    """Smaller and larger than what was traced, odd sides, one pixel, and multiples, which need no padding."""
    model = maskformer(backbone="tiny")  # strides up to 16: guards refuse images of one cell
    run = export_program(model, portable=portable).module()
    for shape in [(1, 3, 64, 96), (3, 3, 45, 70), (2, 3, 1, 1), (1, 3, 31, 33), (1, 3, 200, 130)]:
        images = torch.rand(shape)
        assert_same_labels(run(images)["labels"], model, images)


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda: maskformer(masked_attention=True, decoder_layers=3), mask2former])
def test_kernels_of_attention_with_any_size(make):
    """Grids of the feature levels reach the operators as symbols too."""
    model = make()
    program = export_program(model, portable=False, task="logits")
    expected = {"fastmask.masked_attention.default"}
    assert own_operators(program) == expected | (
        {"fastmask.deformable_attention.default"} if make is mask2former else set()
    )
    for shape in [(1, 3, 64, 96), (3, 3, 45, 70)]:
        images = torch.rand(shape)
        outputs = program.module()(images)
        class_logits, mask_logits, _ = model.eval().final_logits(images)
        assert_same_scores(outputs["class_logits"], class_logits.detach())
        assert_same_scores(outputs["mask_logits"], mask_logits.detach())


class Branching(torch.nn.Module):
    """A backbone that does otherwise with larger images."""

    channels = (8, 8)

    def forward(self, pixels):
        height = pixels.shape[-2]
        maps = pixels.mean(1, keepdim=True).expand(-1, 8, -1, -1)
        return [torch.nn.functional.adaptive_avg_pool2d(2 * maps if height < 128 else maps, 4)] * 2


def test_a_network_that_holds_for_some_sizes_alone_is_refused():
    """The condition becomes one on the program's inputs, which running it on other sizes finds."""
    model = MaskFormer(MaskFormerConfig.preset("tiny", CLASSES, **TINY), backbone=Branching())
    with pytest.raises(ValueError, match="cannot be exported with height, width left open, give size"):
        export_program(model, batch_size=1, task="logits")


@portable_or_not
@pytest.mark.slow
def test_programs_compile_in_one_graph(portable):
    model, program = exported(maskformer, portable=portable)
    images = torch.rand(2, 3, *SIZE)
    with torch.no_grad():
        labels = torch.compile(program.module(), fullgraph=True, backend="aot_eager")(images)["labels"]
    assert_same_labels(labels, model, images)


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda: maskformer(masked_attention=True), segmenter])
def test_the_way_from_images_to_labels_compiles_in_one_graph(make):
    """What ``predict`` does, as torch.compile traces it; the second size compiles for sizes that vary."""
    model = make().eval()
    run = torch.compile(ImageTask(model, "semantic", None, "auto"), fullgraph=True, backend="aot_eager")
    for size in (SIZE, (64, 96)):
        images = torch.rand(2, 3, *size)
        with torch.no_grad():
            labels = run(images)["labels"]
        assert_same_labels(labels, model, images, **whole_images(model))
