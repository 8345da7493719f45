"""On a GPU: the criterion and a training step keep the host free, repeat bit for bit, and fit a CUDA graph."""

from __future__ import annotations

import pytest
import torch

from benchmarks.harness.graphs import capture
from fastmask import HungarianMatcher, MaskFormer, MaskFormerConfig, SetCriterion
from fastmask.functional import mask_products
from tests.helpers.host_syncs import host_syncs
from tests.helpers.inputs import random_targets

pytestmark = pytest.mark.cuda

SHAPE = (3, 2, 20, 5, 6, 32, 32, 128, 128)
CHANNELS = 16


def outputs_on_gpu(
    shape: tuple[int, ...], generator: torch.Generator, form: str, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """The criterion's input in one of its stacked forms, and its leaves."""
    layers, batch_size, num_queries, num_classes, _, h, w, *_ = shape
    class_logits = torch.randn(layers, batch_size, num_queries, num_classes + 1, generator=generator)
    mask_embed = torch.randn(layers, batch_size, num_queries, CHANNELS, generator=generator)
    pixel_embed = torch.randn(batch_size, CHANNELS, h, w, generator=generator)
    class_logits, mask_embed, pixel_embed = (x.to("cuda", dtype) for x in (class_logits, mask_embed, pixel_embed))
    if form == "embeddings":
        outputs = {"class_logits": class_logits, "mask_embed": mask_embed, "pixel_embed": pixel_embed}
    else:
        outputs = {"class_logits": class_logits, "mask_logits": mask_products(mask_embed, pixel_embed)}
    leaves = [value.requires_grad_() for value in outputs.values()]
    return outputs, leaves


def losses_and_gradients(criterion, outputs, targets, leaves) -> list[torch.Tensor]:
    losses = criterion(outputs, targets)
    return [*losses.values(), *torch.autograd.grad(sum(losses.values()), leaves)]


def make_criterion(num_classes: int) -> SetCriterion:
    return SetCriterion(num_classes, HungarianMatcher(1.0, 20.0, 1.0), {}).cuda()


@pytest.mark.parametrize("form", ["embeddings", "mask logits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_criterion_makes_no_host_sync_and_equals_the_cpu(form, dtype, generator):
    outputs, leaves = outputs_on_gpu(SHAPE, generator, form, dtype)
    targets = random_targets(SHAPE, generator, "segments")
    criterion, on_gpu = make_criterion(SHAPE[3]), targets.to("cuda")
    losses_and_gradients(criterion, outputs, on_gpu, leaves)
    with host_syncs():
        results = losses_and_gradients(criterion, outputs, on_gpu, leaves)
    cpu = {name: value.detach().cpu().float().requires_grad_() for name, value in outputs.items()}
    expected = losses_and_gradients(criterion.cpu(), cpu, targets, list(cpu.values()))
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for result, value in zip(results, expected, strict=True):
        scale = value.abs().max().item()
        torch.testing.assert_close(result.cpu().float(), value, rtol=tolerance, atol=tolerance * scale)


def test_twenty_runs_give_the_same_bits(generator):
    outputs, leaves = outputs_on_gpu(SHAPE, generator, "embeddings")
    targets = random_targets(SHAPE, generator, "masks").to("cuda")
    criterion = make_criterion(SHAPE[3])
    first = losses_and_gradients(criterion, outputs, targets, leaves)
    for _ in range(19):
        again = losses_and_gradients(criterion, outputs, targets, leaves)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_two_streams_do_not_disturb_each_other(generator):
    criterion = make_criterion(SHAPE[3])
    work = []
    for _ in range(2):
        outputs, leaves = outputs_on_gpu(SHAPE, generator, "embeddings")
        work.append((outputs, random_targets(SHAPE, generator, "segments").to("cuda"), leaves))
    alone = [losses_and_gradients(criterion, *each) for each in work]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in work]
    together = [[], []]
    for _ in range(5):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                together[i].append(losses_and_gradients(criterion, *work[i]))
    torch.cuda.synchronize()
    for expected, runs in zip(alone, together, strict=True):
        for run in runs:
            assert all(torch.equal(one, other) for one, other in zip(expected, run, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_device(generator):
    outputs, leaves = outputs_on_gpu(SHAPE, generator, "embeddings")
    targets = random_targets(SHAPE, generator, "segments")
    criterion = make_criterion(SHAPE[3])
    expected = losses_and_gradients(criterion, outputs, targets.to("cuda:0"), leaves)
    moved = {name: value.detach().to("cuda:1").requires_grad_() for name, value in outputs.items()}
    results = losses_and_gradients(criterion.to("cuda:1"), moved, targets.to("cuda:1"), list(moved.values()))
    for result, value in zip(results, expected, strict=True):
        assert result.device.index == 1 and torch.equal(result.cpu(), value.cpu())


@pytest.mark.parametrize("masked_attention", [False, True])
def test_a_whole_training_step_makes_no_host_sync(masked_attention, generator):
    """Forward, matching, losses, backward and optimizer; tests/gpu/test_host_syncs.py shows the same without a GPU."""
    options = {"masked_attention": masked_attention}
    model = MaskFormer(MaskFormerConfig.preset("tiny", 5, **options)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, capturable=True)
    targets = random_targets((1, 2, 1, 5, 6, 1, 1, 64, 64), generator, "segments").to("cuda")
    images = torch.rand(2, 3, 64, 64, device="cuda")

    def step() -> None:
        optimizer.zero_grad()
        sum(model(images, targets).values()).backward()
        optimizer.step()

    step()  # compiles
    with host_syncs():
        step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_cuda_graph_replays_the_whole_training_step(generator):
    """Forward, matching, losses, backward and optimizer in one graph; new images, targets and counts are copied in."""
    torch.manual_seed(0)
    model = MaskFormer(MaskFormerConfig.preset("tiny", 5, decoder_layers=2)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, capturable=True)
    shape = (1, 2, 1, 5, 6, 1, 1, 64, 64)
    images = torch.rand(2, 3, 64, 64, device="cuda")
    targets = random_targets(shape, generator, "segments").to("cuda")

    def step() -> torch.Tensor:
        total = sum(model(images, targets).values())
        optimizer.zero_grad(set_to_none=False)
        total.backward()
        optimizer.step()
        return total.detach()

    graph, total = capture(step)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(3):
        fresh = random_targets(shape, generator, "segments").to("cuda")
        for name in ("labels", "counts", "segments"):
            getattr(targets, name).copy_(getattr(fresh, name))
        images.copy_(torch.rand(images.shape, generator=generator))
        model.load_state_dict(state)
        expected = sum(model(images, targets).values()).detach()
        graph.replay()
        torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-5)


def test_memory_does_not_grow_with_the_targets_size(generator):
    """The targets themselves are the caller's; what the criterion adds depends on the logits alone."""
    extra = []
    for side in (128, 1024):
        shape = (*SHAPE[:7], side, side)
        outputs, leaves = outputs_on_gpu(shape, generator, "mask logits")
        targets = random_targets(shape, generator, "segments").to("cuda")
        criterion = make_criterion(shape[3])
        losses_and_gradients(criterion, outputs, targets, leaves)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        losses_and_gradients(criterion, outputs, targets, leaves)
        extra.append(torch.cuda.max_memory_allocated() - before)
    assert extra[1] < 1.1 * extra[0]
