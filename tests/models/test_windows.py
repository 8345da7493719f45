"""Sliding windows against a plain loop over them."""

import pytest
import torch
from torch.nn.functional import interpolate
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastmask.models import Segmenter, SegmenterConfig
from fastmask.models._views import window_starts, windowed_logits

CLASSES = 3


@pytest.fixture
def model():
    model = Segmenter(SegmenterConfig.preset("tiny", CLASSES, encoder_layers=1, window_size=40, window_stride=24))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double().eval()


def plain(model, image, size, stride):
    """``(K, H, W)`` logits of an image that no side of is smaller than a window: one window after the other."""
    _, height, width = image.shape
    total, count = torch.zeros(CLASSES, height, width).double(), torch.zeros(height, width)
    tops = [top for top in range(0, height, stride) if top < height - size] + [height - size]
    lefts = [left for left in range(0, width, stride) if left < width - size] + [width - size]
    for top in tops:
        for left in lefts:
            logits = model(image[None, :, top : top + size, left : left + size])["logits"]
            padded = [-(-size // 8) * 8] * 2
            logits = interpolate(logits, size=padded, mode="bilinear")[0, :, :size, :size]
            total[:, top : top + size, left : left + size] += logits
            count[top : top + size, left : left + size] += 1
    assert count.min() >= 1
    return total / count


@pytest.mark.parametrize(
    ("image_size", "window"),
    [
        ((64, 96), (40, 24)),  # the last windows overlap more than the others
        ((88, 64), (40, 24)),  # they fit exactly
        ((40, 40), (40, 40)),  # one window
        ((41, 40), (40, 40)),  # one pixel more
        ((61, 75), (30, 7)),  # sides and windows that no patch divides
        ((64, 64), (64, 1)),
        ((40, 120), (20, 20)),  # no overlap
    ],
)
@pytest.mark.parametrize("window_batch", [1, 3, 100])
def test_windows_equal_a_plain_loop(model, image_size, window, window_batch):
    image = torch.rand(3, *image_size).double()
    expected = plain(model, image, *window)
    scores = model.predict(image[None], window=window, window_batch=window_batch, output="scores")[0]
    torch.testing.assert_close(scores, expected.softmax(0))
    labels = model.predict(image[None], window=window, window_batch=window_batch)[0]
    sure = expected.sort(0).values.diff(dim=0)[-1] > 1e-9
    assert torch.equal(labels[sure].long(), expected.argmax(0)[sure]) and sure.float().mean() > 0.99


@pytest.mark.parametrize(
    ("image_size", "enlarged"), [((20, 30), (40, 60)), ((33, 17), (77, 40)), ((1, 1), (40, 40)), ((200, 39), (205, 40))]
)
def test_images_smaller_than_a_window_are_enlarged(model, image_size, enlarged):
    image = torch.rand(3, *image_size).double()
    larger = interpolate(image[None], size=enlarged, mode="bilinear")[0]
    expected = interpolate(plain(model, larger, 40, 24)[None], size=image_size, mode="bilinear")[0]
    torch.testing.assert_close(model.predict(image[None], output="scores")[0], expected.softmax(0))


def test_results_have_the_size_asked_for(model):
    image = torch.rand(3, 64, 70).double()
    expected = interpolate(plain(model, image, 40, 24)[None], size=(31, 100), mode="bilinear")[0]
    torch.testing.assert_close(model.predict(image[None], (31, 100), output="scores")[0], expected.softmax(0))


@pytest.mark.parametrize("window_batch", [1, 4, 5])
def test_windows_of_several_images_share_batches(model, window_batch):
    """Images of 6, 1 and 4 windows, in one list: batches run across images, results do not."""
    images = [torch.rand(3, *size).double() for size in [(64, 80), (40, 30), (50, 45)]]
    together = model.predict(images, window_batch=window_batch, output="scores")
    for image, scores in zip(images, together, strict=True):
        torch.testing.assert_close(scores, model.predict(image[None], output="scores")[0])
        assert scores.shape[1:] == image.shape[1:]


def test_a_batch_holds_as_many_windows_as_asked_for(model):
    seen = []
    model.encoder.patch_embed.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    model.predict([torch.rand(3, 64, 88).double(), torch.rand(3, 40, 64).double()], window_batch=3)
    assert seen == [3, 3, 2]


def test_an_int_is_size_and_stride(model):
    image = torch.rand(1, 3, 70, 64).double()
    one, other = (model.predict(image, window=window, output="scores")[0] for window in (32, (32, 32)))
    assert torch.equal(one, other)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_memory_does_not_grow_with_the_number_of_windows():
    """5 x 5 windows of 20 classes: nothing is larger than the image's own logits, whatever the overlap."""
    image = torch.rand(3, 96, 96)
    largest = Largest()
    with largest:
        segment = lambda windows: (window[:1].expand(20, 32, 32).clone() for window in windows)  # noqa: E731
        logits = list(windowed_logits([image], segment, 32, 16, 4))
    assert largest.elements == 20 * 96 * 96
    torch.testing.assert_close(logits[0], image[:1].expand(20, 96, 96))


def test_one_image_is_in_memory_at_a_time():
    steps = []

    def segment(windows):
        steps.append("segment")
        return [window[:1] for window in windows]

    images = [torch.rand(3, 32, 32) for _ in range(3)]
    for image, logits in zip(images, windowed_logits(images, segment, 32, 32, 1), strict=True):
        steps.append("result")
        assert torch.equal(logits, image[:1])
    assert steps == ["segment", "result"] * 3


def test_starts_cover_a_side_and_end_with_it():
    assert window_starts(100, 100, 30) == [0]
    assert window_starts(101, 100, 30) == [0, 1]
    assert window_starts(160, 100, 30) == [0, 30, 60]
    assert window_starts(161, 100, 30) == [0, 30, 60, 61]
