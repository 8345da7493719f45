"""Trains and evaluates one run; finds how many steps fit into a time budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.ablations import images, sounds
from benchmarks.ablations.query_classes import QueryClasses
from benchmarks.ablations.variants import SOUND, Choice, Run, Settings, Variant, comparisons, main_metric
from fastmask.files import finite
from fastmask.models import MaskFormerConfig
from fastmask.training import Trainer
from fastmask.training.random_state import random_state, set_random_state
from fastmask.training.step_checkpoints import load_newest, save_checkpoint

MEASURED_STEPS = 4
EVALUATION_SHARE = 0.15  # of a time budget
TAIL = 0.1  # the share of steps, at the end, over which the loss is averaged
# Evaluations of a run, at equal distances, the last at its end; fewer where they would take a large share of the time.
EVALUATIONS, STEPS_BETWEEN = 5, 500
CHECKPOINT_EVERY = 250  # steps


class Bench:
    """The settings that the runs of one invocation share.

    Args:
        image_settings, sound_settings: the settings of the two kinds of runs.
        device: the device to run on.
        workers: processes that read samples.
    """

    def __init__(self, image_settings: Settings, sound_settings: Settings, device: torch.device, workers: int = 0):
        self.image_settings = image_settings
        self.sound_settings = sound_settings
        self.device = device
        self.workers = workers
        images.check_images(image_settings)
        self.info = images.open_images(image_settings, "train", "semantic").info
        self.panoptic = images.has_panoptic_truth(image_settings)
        self.preset = images.network_config(image_settings, self.info.num_classes)
        images.check_weights(image_settings, self.preset)
        self.sound = sounds.sound_config(sound_settings.model)
        self.stuff: tuple[int, ...] = ()
        if self.panoptic:
            self.stuff = images.open_images(image_settings, "train", "panoptic").info.stuff_classes

    def with_steps(self, steps: int) -> Bench:
        """The same with another number of steps."""
        settings = (replace(s, steps=steps) for s in (self.image_settings, self.sound_settings))
        return Bench(*settings, self.device, self.workers)

    def comparisons(self, queries: Sequence[int], layers: Sequence[int]) -> dict[str, list[Variant]]:
        """The variants of each comparison on these data."""
        return comparisons(
            self.info.num_classes,
            images.num_layers(self.preset),
            panoptic=self.panoptic,
            sound_classes=self.sound.num_classes,
            sound_layers=self.sound.decoder_layers,
            per_pixel=isinstance(self.preset, MaskFormerConfig),
            queries=queries,
            layers=[number for number in layers if number <= images.most_layers(self.preset)],
        )

    def settings_of(self, run: Run) -> Settings:
        settings = self.sound_settings if run.variant.structure in SOUND else self.image_settings
        return replace(settings, steps=settings.tuning_steps) if run.tunes and settings.tuning_steps else settings

    def choices(self, structure: str) -> list[Choice]:
        """Those among which a structure's best is found."""
        return (self.sound_settings if structure in SOUND else self.image_settings).choices(structure)

    def choice_of(self, run: Run) -> Choice:
        return run.choice or self.settings_of(run).choices(run.variant.structure)[0]

    def trainer(self, run: Run) -> Trainer:
        """A network with its first weights, ready for training."""
        settings, choice = self.settings_of(run), self.choice_of(run)
        torch.manual_seed(run.seed)
        if run.variant.structure in SOUND:
            network = sounds.make_detector(settings, run.variant)
        else:
            weight = choice.class_weight
            network = images.make_network(settings, run.variant, self.info.class_names, self.stuff, weight)
        return Trainer(network.to(self.device).train(), settings.recipe(choice), precision=settings.precision)

    def batches(self, run: Run, workers: int, start: int = 0) -> Any:
        """Those of the steps from ``start`` on."""
        make = sounds.training_clips if run.variant.structure in SOUND else images.training_batches
        return make(self.settings_of(run), run, workers, start)

    def train(
        self,
        run: Run,
        progress: Callable[[int, float], None] = lambda step, loss: None,
        checkpoints: Path | None = None,
    ) -> dict[str, Any]:
        """Trains and evaluates.

        Args:
            run: what to train.
            progress: called occasionally with the step and its loss.
            checkpoints: a folder for the run's checkpoints. An interrupted run continues from the newest one there, and
                gives the numbers that it would have given.

        Returns:
            A row of the results: "variant", "seed", "settings", "choice", "class_names", "base_layers" (of variants
            that do not vary them), "parameters" (their number), "seconds", "loss" (of the last steps), "metrics",
            "curve" (pairs of a step and the main metric after it), and for mask classification "query_classes", the
            ``(N, K)`` counts of :class:`QueryClasses`, and "evaluated", of how many images. A loss or metric that is no
            number is None.
        """
        settings, is_sound = self.settings_of(run), run.variant.structure in SOUND
        trainer, tail, curve, start = self.trainer(run), [], [], time.perf_counter()
        found = load_newest(checkpoints) if checkpoints else None
        if found is not None:
            trainer.load_state_dict(found[1]["trainer"])
            tail, curve, start = found[1]["tail"], found[1]["curve"], start - found[1]["seconds"]
        batches = self.batches(run, self.workers, trainer.steps)
        if found is not None:
            set_random_state(found[1]["random"])
        every, between = max(1, settings.steps // 50), max(STEPS_BETWEEN, settings.steps // EVALUATIONS)
        for step, batch in enumerate(batches, trainer.steps + 1):
            loss = trainer.step([batch])["loss"]
            if step > settings.steps * (1 - TAIL) or step == settings.steps:
                tail.append(loss)
            if step % every == 0:
                progress(step, loss.item())
            if step % between == 0 and step < settings.steps:
                curve.append([step, finite(self.evaluate(run, trainer.model)[0][main_metric(run)])])
                trainer.model.train()
            if checkpoints and step % CHECKPOINT_EVERY == 0:
                state = {"trainer": trainer.state_dict(), "random": random_state(), "tail": tail, "curve": curve}
                save_checkpoint(checkpoints, step, state | {"seconds": time.perf_counter() - start})
        network = trainer.model
        metrics, queries = self.evaluate(run, network)
        row = {
            "variant": asdict(run.variant),
            "seed": run.seed,
            "settings": settings.as_row(),
            "choice": asdict(self.choice_of(run)),
            "class_names": list(self.sound.class_names if is_sound else self.info.class_names),
            "base_layers": self.sound.decoder_layers if is_sound else images.num_layers(self.preset),
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "seconds": round(time.perf_counter() - start),
            "loss": finite(torch.stack(tail).mean().item()),
            "metrics": finite(metrics),
            "curve": [*curve, [settings.steps, finite(metrics[main_metric(run)])]],
        }
        if queries is not None:
            row |= {"query_classes": queries.counts.tolist(), "evaluated": queries.images}
        return row

    def evaluate(self, run: Run, network: Any) -> tuple[dict[str, float], QueryClasses | None]:
        """The metrics on held-out samples, and for mask classification the classes of its queries. Leaves the network
        in evaluation mode."""
        settings = self.settings_of(run)
        if run.variant.structure in SOUND:
            clips = sounds.validation_clips(settings, self.workers)
            return sounds.evaluate_clips(network, clips, self.device), None
        held_out = images.validation_batches(settings, run.variant.task, self.workers)
        return images.evaluate_images(network, held_out, run.variant, self.stuff)

    def step_seconds(self, run: Run) -> float:
        """The seconds of one training step, including reading its samples, without the first step."""
        trainer = self.trainer(run)
        start = 0.0
        for number, batch in enumerate(islice(self.batches(run, 0), MEASURED_STEPS + 1)):
            trainer.step([batch])
            self._wait()
            if number == 0:
                start = time.perf_counter()
        return (time.perf_counter() - start) / MEASURED_STEPS

    def affordable_steps(self, runs: Sequence[Run], minutes: float) -> int:
        """The number of steps per run that fits the time if every run is as slow as the slowest variant."""
        one_each = {run.variant: run for run in reversed(runs)}
        timed = self.with_steps(MEASURED_STEPS + 1)
        slowest = max(timed.step_seconds(run) for run in one_each.values())
        return max(1, int(60 * minutes * (1 - EVALUATION_SHARE) / (len(runs) * slowest)))

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
