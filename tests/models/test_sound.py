"""The sound event detector: frames and events, losses, and that it learns."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastmask import SoundEventConfig, SoundEventDetector
from fastmask.data import EVENT_CLASSES, ComposedClips, collate_clips
from fastmask.models.sound import SoundTargets, decode_events, frame_probabilities
from fastmask.modules.audio import LogMel, linear_softmax, median_filter
from tests.helpers.tiny_models import learn

CLASSES = len(EVENT_CLASSES)


def tiny(**options):
    torch.manual_seed(0)
    return SoundEventDetector(SoundEventConfig.preset("tiny", CLASSES, **options))


def batch(count=4, duration=2.0, split="train"):
    clips = ComposedClips(split, duration=duration)
    return collate_clips([clips[i] for i in range(count)])


def test_shapes_and_probabilities():
    model = tiny().eval()
    for samples in (640, 700, 32_000, 33_333):
        outputs = model(torch.randn(3, samples))
        frames = math.ceil(samples / model.config.frame_samples)
        assert outputs["mask_logits"].shape == (2, 3, CLASSES, frames)
        assert outputs["presence_logits"].shape == (2, 3, CLASSES)
        y = outputs["frame_probabilities"]
        expected = outputs["presence_logits"][-1].sigmoid()[..., None] * outputs["mask_logits"][-1].sigmoid()
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(outputs["clip_probabilities"], (y * y).sum(-1) / y.sum(-1))


def test_log_mel_finds_a_tone():
    front = LogMel(16_000, 64, 512, 160)
    time = torch.arange(16_000) / 16_000
    mel = front(torch.stack([torch.sin(2 * math.pi * 440 * time), torch.sin(2 * math.pi * 3000 * time)]))
    assert mel.shape == (2, 64, 100)
    low, high = mel.mean(-1).argmax(-1).tolist()
    assert low < 20 < high
    assert torch.isfinite(front(torch.zeros(1, 16_000))).all()


def test_targets_on_frames():
    events = [
        {"labels": torch.tensor([2, 2, 0]), "onsets": [0.10, 0.50, 1.99], "offsets": [0.21, 0.50, 9.0]},
        {"labels": torch.tensor([1])},
        {"labels": [], "onsets": [], "offsets": []},
    ]
    targets = SoundTargets.from_events(events, 3, 20, 0.1)
    assert targets.presence.tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 0]]
    assert targets.strong.tolist() == [True, False, True]
    assert targets.activity[0, 2].nonzero().flatten().tolist() == [1, 5]
    assert targets.activity[0, 0].nonzero().flatten().tolist() == [19]
    assert targets.activity[1:].sum() == 0
    masks = targets.masks()
    assert masks.labels.tolist() == [[0, 2, -1], [-1, -1, -1], [-1, -1, -1]]
    assert torch.equal(masks.masks[0, :2, 0], targets.activity[0, [0, 2]])


def test_decoding_is_the_inverse_of_targets():
    generator = torch.Generator().manual_seed(0)
    active = torch.rand(5, 60, generator=generator).round()
    events = decode_events(active * 0.9 + 0.05, 0.04)
    labels = torch.tensor([event["label"] for event in events])
    clip = {"labels": labels, **{f"{k}s": torch.tensor([event[k] for event in events]) for k in ("onset", "offset")}}
    assert torch.equal(SoundTargets.from_events([clip], 5, 60, 0.04).activity[0], active.to(torch.uint8))
    assert all(event["score"] == pytest.approx(0.95) for event in events)
    assert [event["onset"] for event in events] == sorted(event["onset"] for event in events)
    assert decode_events(torch.zeros(3, 10), 0.1) == []


def test_the_median_filter_closes_gaps_and_drops_spikes():
    from scipy.ndimage import median_filter as scipy_median

    active = torch.rand(4, 50, generator=torch.Generator().manual_seed(1)) < 0.5
    for frames in (1, 3, 7):
        expected = scipy_median(active.numpy().astype(int), (1, frames), mode="constant")
        assert torch.equal(median_filter(active, frames).int(), torch.from_numpy(expected).int())
    probabilities = torch.tensor([[0, 0, 1.0, 0, 0, 0, 1, 1, 0, 1, 1, 0, 0]])
    assert len(decode_events(probabilities, 0.1)) == 3
    (event,) = decode_events(probabilities, 0.1, median_seconds=0.3)
    assert (event["onset"], event["offset"]) == pytest.approx((0.6, 1.1))


def test_losses_by_hand():
    model = tiny(decoder_layers=1, mask_weight=0.0, dice_weight=0.0, weak_weight=1.0)
    waveforms, events = batch(3)
    events[1] = {"labels": events[1]["labels"]}
    losses = model(waveforms, events)
    outputs = model(waveforms)
    targets = model.targets_of(events, outputs["mask_logits"])
    y = outputs["frame_probabilities"]
    rows = targets.strong.nonzero().flatten()
    strong = F.binary_cross_entropy(y[rows], targets.activity[rows].float())
    weak = F.binary_cross_entropy(linear_softmax(y), targets.presence)
    torch.testing.assert_close(losses["loss_strong"], strong, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses["loss_weak"], weak, rtol=1e-4, atol=1e-6)
    assert losses["loss_mask"] == losses["loss_dice"] == 0


def test_clips_without_times_or_events_train():
    model = tiny()
    waveforms, _ = batch(2)
    for events in ([{"labels": [1]}, {"labels": []}], [{"labels": [], "onsets": [], "offsets": []}] * 2):
        losses = model(waveforms, events)
        assert len(losses) == 8 and all(loss.isfinite() for loss in losses.values())
        sum(losses.values()).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
def test_it_learns():
    model = tiny()
    waveforms, events = batch(4, duration=1.0)
    learn(model, waveforms, events, 80)
    frames = torch.stack([clip["frame_probabilities"] for clip in model.predict(waveforms)])
    activity = model.targets_of(events, frames).activity.bool()
    found = frames > 0.5
    assert 2 * (found & activity).sum() > 0.8 * (found.sum() + activity.sum())  # F1 of the frames


def test_a_frame_encoder_of_ones_own():
    encoder = nn.Sequential(nn.Unflatten(1, (1, -1)), nn.Conv1d(1, 64, 640, stride=640))
    model = SoundEventDetector(SoundEventConfig.preset("tiny", 3), frame_encoder=encoder)
    assert model(torch.randn(2, 3200))["mask_logits"].shape == (2, 2, 3, 5)


def test_products_of_float16_logits_stay_finite():
    logits = torch.tensor([6e4, -6e4], dtype=torch.float16)
    assert frame_probabilities(logits, logits[:, None]).flatten().tolist() == [1.0, 0.0]


def test_bad_arguments():
    model = tiny()
    waveforms, events = batch(2)
    with pytest.raises(TypeError, match="floating-point"):
        model(waveforms.int())
    with pytest.raises(ValueError, match=r"waveforms has shape \(32000,\)"):
        model(waveforms[0])
    with pytest.raises(ValueError, match="at least one frame of 640 samples"):
        model(waveforms[:, :600])
    with pytest.raises(ValueError, match="a list of 2 dicts, one for each clip; got 1"):
        model(waveforms, events[:1])
    with pytest.raises(ValueError, match=r'"labels"\] holds 7; expected 0..6'):
        model(waveforms, [{"labels": [7]}, {"labels": []}])
    with pytest.raises(ValueError, match='only one of "onsets" and "offsets"'):
        model(waveforms, [{"labels": [1], "onsets": [0.0]}, {"labels": []}])
    with pytest.raises(ValueError, match="1 labels, 1 onsets and 2 offsets"):
        model(waveforms, [{"labels": [1], "onsets": [0.0], "offsets": [1.0, 2.0]}, {"labels": []}])
    with pytest.raises(ValueError, match=r"an event from 1.0 to 0.5 seconds"):
        model(waveforms, [{"labels": [1], "onsets": [1.0], "offsets": [0.5]}, {"labels": []}])
    with pytest.raises(TypeError, match="must be a dict"):
        model(waveforms, [[1], [2]])
    with pytest.raises(ValueError, match="threshold must lie in 0..1"):
        model.predict(waveforms, threshold=2)
    with pytest.raises(ValueError, match="time_stride is 3"):
        SoundEventConfig(3, time_stride=3)
    with pytest.raises(ValueError, match="temperature is 0.0"):
        SoundEventConfig(3, temperature=0)
