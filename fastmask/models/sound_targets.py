"""Sound events as targets on a grid of frames, and frames as events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmask.modules.audio import median_filter
from fastmask.targets import PADDING_LABEL, Targets


@dataclass(frozen=True)
class SoundTargets:
    """What a batch of clips holds.

    Args:
        presence: ``(B, K)`` float32, 1 where a clip has events of a class.
        activity: ``(B, K, T)`` uint8, 1 in frames in which a class sounds; 0 for clips without times.
        strong: ``(B,)`` bool, whether the times of a clip's events are known.
    """

    presence: Tensor
    activity: Tensor
    strong: Tensor

    @staticmethod
    def from_events(
        events: Sequence[Mapping[str, Tensor]],
        num_classes: int,
        num_frames: int,
        frame_seconds: float,
        device: torch.device | str | None = None,
    ) -> SoundTargets:
        """Targets of clips of ``num_frames`` frames.

        A class sounds in the frames that lie between the rounded times of its events, in one frame at least.

        Args:
            events: for each clip "labels" ``(E,)`` in ``0..K-1`` and, where times are known, "onsets" and "offsets"
                ``(E,)`` in seconds.
            num_classes: K.
            num_frames: T.
            frame_seconds: of one frame.
            device: of the result.

        Raises:
            TypeError: something else than a dict a clip.
            ValueError: labels out of range, times that differ in number, end before they begin or are not finite.
        """
        presence = torch.zeros(len(events), num_classes)
        activity = torch.zeros(len(events), num_classes, num_frames, dtype=torch.uint8)
        strong = torch.zeros(len(events), dtype=torch.bool)
        for b, clip in enumerate(events):
            labels, times = _check_clip(b, clip, num_classes)
            presence[b, labels] = 1
            strong[b] = times is not None
            for label, (onset, offset) in zip(labels, times or (), strict=False):
                first = min(max(round(onset / frame_seconds), 0), num_frames - 1)
                activity[b, label, first : max(round(offset / frame_seconds), first + 1)] = 1
        return SoundTargets(presence.to(device), activity.to(device), strong.to(device))

    def masks(self) -> Targets:
        """The classes that sound as targets of the mask losses, whose masks are 1 x T."""
        present = (self.presence > 0) & self.strong[:, None]
        # Present classes first, as Targets wants them.
        order = (~present).to(torch.uint8).argsort(dim=1, stable=True)
        labels = order.masked_fill(~present.gather(1, order), PADDING_LABEL)
        masks = self.activity.gather(1, order[..., None].expand_as(self.activity))
        return Targets(labels, present.sum(1), masks=masks[:, :, None])


def decode_events(
    probabilities: Tensor, frame_seconds: float, *, threshold: float = 0.5, median_seconds: float = 0.0
) -> list[dict[str, Any]]:
    """The events of a clip: runs of frames in which a class is more probable than ``threshold``.

    Args:
        probabilities: ``(K, T)``.
        frame_seconds: of one frame.
        threshold: 0..1.
        median_seconds: length of a median filter that closes gaps and drops spikes, rounded to an odd number of frames.

    Returns:
        {"label", "onset", "offset", "score"} of each event, by onset; times in seconds, the score being the mean
        probability of its frames.

    Raises:
        ValueError: a threshold outside 0..1, or a negative length.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must lie in 0..1, got {threshold}")
    if not median_seconds >= 0:
        raise ValueError(f"median_seconds must be at least 0, got {median_seconds}")
    probabilities = probabilities.detach().float().cpu()
    active = median_filter(probabilities > threshold, 2 * round(median_seconds / frame_seconds / 2) + 1)
    edges = torch.nn.functional.pad(active.int(), (1, 1)).diff(dim=1)  # 1 where a run begins, -1 after its end
    # Both in the order of classes and then of time, so that beginnings and ends go together.
    begins, ends = (edges == 1).nonzero().tolist(), (edges == -1).nonzero().tolist()
    events = [
        {
            "label": label,
            "onset": begin * frame_seconds,
            "offset": end * frame_seconds,
            "score": probabilities[label, begin:end].mean().item(),
        }
        for (label, begin), (_, end) in zip(begins, ends, strict=True)
    ]
    return sorted(events, key=lambda event: (event["onset"], event["label"]))


def _check_clip(b: int, clip: Any, num_classes: int) -> tuple[list[int], list[tuple[float, float]] | None]:
    if not isinstance(clip, Mapping) or "labels" not in clip:
        raise TypeError(f'targets[{b}] must be a dict with "labels", and with "onsets" and "offsets" where known')
    labels = torch.as_tensor(clip["labels"]).tolist()
    for label in labels:
        if not isinstance(label, int) or not 0 <= label < num_classes:
            raise ValueError(f'targets[{b}]["labels"] holds {label}; expected 0..{num_classes - 1}')
    if ("onsets" in clip) != ("offsets" in clip):
        raise ValueError(f'targets[{b}] has only one of "onsets" and "offsets"')
    if "onsets" not in clip:
        return labels, None
    onsets, offsets = (torch.as_tensor(clip[key]).tolist() for key in ("onsets", "offsets"))
    if not len(onsets) == len(offsets) == len(labels):
        raise ValueError(
            f"targets[{b}] has {len(labels)} labels, {len(onsets)} onsets and {len(offsets)} offsets; expected as many"
        )
    for onset, offset in zip(onsets, offsets, strict=True):
        if not 0 <= onset <= offset < float("inf"):
            raise ValueError(
                f"targets[{b}] has an event from {onset} to {offset} seconds; expected times of 0 and more, in order"
            )
    return labels, list(zip(onsets, offsets, strict=True))
