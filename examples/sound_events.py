"""Trains a small detector of sound events on composed clips, scores it, and prints what it hears in one clip."""

from __future__ import annotations

import argparse
from itertools import chain, islice, repeat

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import fastmask
from fastmask.data import EVENT_CLASSES, ComposedClips, collate_clips
from fastmask.training import evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a clip")
    parser.add_argument("--val-clips", type=int, default=64)
    parser.add_argument("--checkpoint", help="folder of a saved detector to start from")
    parser.add_argument("--output", default="out/sound_events")
    options = parser.parse_args()

    torch.manual_seed(0)
    if options.checkpoint is not None:
        model = fastmask.SoundEventDetector.from_pretrained(options.checkpoint)
    else:
        config = fastmask.SoundEventConfig.preset("tiny", len(EVENT_CLASSES), class_names=tuple(EVENT_CLASSES))
        model = fastmask.SoundEventDetector(config)

    clips = ComposedClips("train", duration=options.seconds)
    loader = DataLoader(clips, options.batch_size, shuffle=True, drop_last=True, collate_fn=collate_clips)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    with tqdm(islice(chain.from_iterable(repeat(loader)), options.steps), total=options.steps) as bar:
        for waveforms, events in bar:
            loss = sum(model(waveforms, events).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.save_pretrained(f"{options.output}/model")

    val = ComposedClips("val", length=options.val_clips, duration=options.seconds)
    numbers = evaluate(model, val).numbers
    print("  ".join(f"{name} {100 * numbers[name]:.1f} %" for name in ("F1", "precision", "recall")))

    clip = val[0]
    print("in the clip:")
    for label, onset, offset in zip(clip.labels.tolist(), clip.onsets.tolist(), clip.offsets.tolist(), strict=True):
        print(f"  {EVENT_CLASSES[label]:<14}{onset:5.2f} to {offset:5.2f} s")
    print("heard:")
    for event in model.predict(clip.waveform[None])[0]["events"]:
        name = EVENT_CLASSES[event["label"]]
        print(f"  {name:<14}{event['onset']:5.2f} to {event['offset']:5.2f} s, score {event['score']:.2f}")


if __name__ == "__main__":
    main()
