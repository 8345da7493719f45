"""A training run in a folder, from the data set to saved networks; it can be interrupted and continued."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import distributed as dist
from torch.utils.data import DataLoader

from fastmask.data import (
    Augmented,
    Compose,
    SegmentationDataset,
    ShardDataset,
    ShardStream,
    check_datasets,
    collate,
    open_dataset,
)
from fastmask.data.shards import is_url
from fastmask.files import read_json, write_json
from fastmask.metrics import InstanceMetrics
from fastmask.models._base import PretrainedModel
from fastmask.models._registry import load_model, model_from_dict
from fastmask.models.model_card import ModelCard
from fastmask.training.activation_checkpointing import checkpoint_activations
from fastmask.training.callbacks import Callback, check_logger
from fastmask.training.config import TrainingConfig, check_task
from fastmask.training.curves import draw_curves
from fastmask.training.distributed import Processes, any_process, cleanup, setup, together, wrap
from fastmask.training.evaluation import evaluate
from fastmask.training.interruption import Interruption, prepare_worker
from fastmask.training.latest_losses import LossRecord
from fastmask.training.main_process import in_main
from fastmask.training.random_state import random_state, random_state_kept, seed_all, set_random_state
from fastmask.training.run_folder import MetricsFile, RunFolder
from fastmask.training.run_log import INSTALL, RunLog
from fastmask.training.sampler import StepSampler
from fastmask.training.step_checkpoints import load_newest, save_checkpoint
from fastmask.training.trainer import Trainer

# The score that determines the best network, by the task of the data set; the curves show all scores.
SCORES = {"semantic": "mIoU", "panoptic": "PQ", "instance": "AP"}
EVALUATION_BATCH = 4


@dataclass(frozen=True)
class TrainingResult:
    """The folders and scores of a finished run.

    Attributes:
        folder: the folder of the run.
        model: the folder of the final network.
        best: the folder of the network with the best evaluation; None without evaluation.
        evaluation: the scores of ``model``, in 0..1; empty without evaluation.
        best_evaluation: the scores of ``best``.
        best_step: the step of ``best``.
    """

    folder: Path
    model: Path
    best: Path | None
    evaluation: dict[str, float | None]
    best_evaluation: dict[str, float | None]
    best_step: int | None


def train(
    config: TrainingConfig | None,
    output: str | Path,
    *,
    resume: bool = False,
    device: str | torch.device | None = None,
    callbacks: Sequence[Callback] = (),
) -> TrainingResult:
    """Trains a network on a data set, in this process or in all processes that ``torchrun`` has started.

    The first Ctrl-C or SIGTERM finishes the step, saves, and ends the program; the second ends it at once. A resumed
    run continues with the samples, optimizer state and random numbers that it would have had without the interruption:
    on a CPU, with the same number of processes, its weights are bitwise the same.

    Args:
        config: the configuration. With ``resume``, None takes that of the run, and only fields in
            ``fastmask.training.config.CHANGEABLE`` may differ from it.
        output: the run's folder. It gets config.json, checkpoints, ``model`` (the latest network), ``best`` (by mIoU,
            PQ or AP), log.txt, metrics.jsonl, curves.png, the logger's files and, at the end, result.json. Processes on
            several machines must all see it.
        resume: continue the run in this folder; the number of processes may change if it divides the batch evenly.
        device: "cpu" or "cuda"; by default CUDA if there is a GPU.
        callbacks: callbacks for process 0, in addition to the logger that ``config.log`` names.

    Raises:
        FileExistsError: the folder is not empty, without ``resume``; or another process trains in it.
        FileNotFoundError: no data set or split; with ``resume``, no run.
        ValueError: broken files in the data set, each named; classes that differ between splits, data set and network;
            with ``resume``, another configuration or number of samples, or no undamaged checkpoint.
        ImportError: a package that the configuration needs is missing; the message says how to install it.
        FloatingPointError: a loss is not finite; the checkpoints are from earlier steps.
        OSError: a file cannot be written; earlier checkpoints remain intact.
        KeyboardInterrupt, SystemExit: after Ctrl-C or SIGTERM, with everything saved.
    """
    if config is None and not resume:
        raise TypeError("config is needed to begin a run")
    had_group = together()
    processes = setup(device)
    folder = RunFolder(output)
    with RunLog(processes.is_main, callbacks) as log, closing(folder):
        if config is None or resume:
            config = in_main(lambda: folder.reopen(config))
        else:
            in_main(folder.check_unused)
        if resume and folder.result.is_file():
            log.say(f"this run has finished: {folder.model}")
        else:
            if resume:
                in_main(folder.lock)
            _Run(config, folder, log, processes, resume).complete()
        result = in_main(partial(_result, folder))
    if not had_group:
        cleanup()
    return result


class _Run:
    """A run in progress.

    Args:
        config: the run's configuration.
        folder: the run's folder, which a new run creates.
        log: gets its messages and numbers.
        processes: this process among all training processes.
        resume: continue a run that was begun before.
    """

    def __init__(self, config: TrainingConfig, folder: RunFolder, log: RunLog, processes: Processes, resume: bool):
        self.config, self.folder, self.log, self.processes = config, folder, log, processes
        in_main(lambda: check_logger(config.log))  # reports a missing package now, not after minutes
        self.train_set, self.val_set = self._open_data(quick=resume)
        self.score = SCORES[self.train_set.info.task]
        state = load_newest(folder.checkpoints) if resume else None
        seed_all(config.seed)
        network = _start_model(config) if state is None else model_from_dict(state[1]["model"])
        name, self.model_config = type(network).__name__, network.config
        if config.activation_checkpointing:
            checkpoint_activations(network)
        model = wrap(network.to(processes.device).train(), config.strategy)
        self.trainer = Trainer(model, config.recipe, precision=config.precision, accumulate=config.accumulate)
        seed_all(int(np.random.SeedSequence([config.seed, processes.rank]).generate_state(1)[0]))
        values: list[dict[str, float]] = []
        if state is not None:
            values = self._restore(state[1])
        # All checks are done; files are written from here on.
        loader = self._loader()
        self.losses = LossRecord(self.trainer.steps, values, may_overflow=config.precision == "float16")
        if not resume:
            in_main(lambda: folder.create(config))
        elif processes.is_main:
            folder.clean()
        log.open(folder, self.trainer.steps, config)
        self.evaluated = in_main(lambda: max(self._evaluations(), default=0))
        self.data = self._step_batches(loader)
        self._say_what_begins(name, None if state is None else state[0])
        self._seconds, self._timed = 0.0, 0

    def complete(self) -> None:
        """Takes the remaining steps and writes the results.

        Raises:
            KeyboardInterrupt, SystemExit: after an interruption, with everything saved.
        """
        once_more = "stopping after this step; interrupt again to stop at once, without saving"
        with Interruption(once_more if self.processes.is_main else "") as interruption, closing(self.data):
            finished = self._take_steps(interruption)
        network = self._network()
        in_main(lambda: self._save(network, self.folder.model, self._evaluations().get(self.trainer.steps, {})))
        if not finished:
            self.log.say(
                f"stopped at step {self.trainer.steps}; fastmask train --resume -o {self.folder.root} continues"
            )
            interruption.end()
        in_main(self._write_result)
        best = f", the best {self.folder.best}" if self.folder.score.is_file() else ""
        self.log.say(f"finished: the network is in {self.folder.model}{best}, curves in {self.folder.curves}")

    def _open_data(self, *, quick: bool) -> tuple[SegmentationDataset, SegmentationDataset | None]:
        config = self.config
        splits = [config.train_split, *([config.val_split] if config.val_split else [])]
        sets = [
            open_dataset(config.data, split, config.kind, config.task or None, skip_invalid=config.skip_invalid)
            for split in splits
        ]
        self.log.say(f"checking {' + '.join(str(len(each)) for each in sets)} samples of {config.data}")
        self.notes = in_main(lambda: check_datasets(sets, full=not quick))
        info, model = sets[0].info, config.model
        for each in sets[1:]:
            if (each.info.class_names, each.info.stuff_classes) != (info.class_names, info.stuff_classes):
                raise ValueError(f"the classes of split {each.split!r} are not those of split {sets[0].split!r}")
        if model.num_classes != info.num_classes or model.class_names not in ((), info.class_names):
            raise ValueError(f"the classes of model are not the {info.num_classes} classes of {config.data}")
        if info.task == "instance":
            check_task(model, info.task)
        if info.task == "instance" and len(sets) > 1:
            InstanceMetrics(info.num_classes)  # reports a missing package now, not after hours
        return sets[0], sets[1] if len(sets) > 1 else None

    def _loader(self) -> DataLoader:
        config, processes = self.config, self.processes
        transform = config.recipe.transform() or Compose(())
        sampler = StepSampler(
            len(self.train_set),
            config.recipe.batch_size,
            config.seed,
            self.trainer.steps,
            config.recipe.steps,
            rank=processes.rank,
            world_size=processes.world_size,
            accumulate=config.accumulate,
        )
        source: dict[str, Any] = {
            "dataset": Augmented(self.train_set, transform, config.seed),
            "batch_sampler": sampler,
        }
        if isinstance(self.train_set, ShardDataset):
            size = config.recipe.batch_size // (processes.world_size * config.accumulate)
            first_batch, ranks = self.trainer.steps * config.accumulate, (processes.rank, processes.world_size)
            source = {
                "dataset": ShardStream(self.train_set, transform, config.seed, size, first_batch, *ranks),
                "batch_size": size,
            }
        return DataLoader(
            **source,
            collate_fn=collate,
            num_workers=config.workers,
            worker_init_fn=prepare_worker,
            pin_memory=processes.device.type == "cuda",
            generator=torch.Generator(),  # the default one would draw from the random state of training
        )

    def _step_batches(self, loader: DataLoader) -> Generator[list[Any], None, None]:
        micro_batches = iter(loader)
        for _ in range(self.trainer.steps, self.config.recipe.steps):
            yield [next(micro_batches) for _ in range(self.config.accumulate)]

    def _take_steps(self, interruption: Interruption) -> bool:
        """Whether all steps were taken, without an interruption."""
        config, trainer = self.config, self.trainer
        if self._evaluation_is_due():
            self._evaluate()
        while trainer.steps < config.recipe.steps:
            start = time.perf_counter()
            rates = {group["name"]: group["lr"] for group in trainer.optimizer.param_groups}
            self.losses.append(trainer.step(next(self.data)))
            self._timed += 1
            stop = any_process(interruption.signal is not None)
            last = trainer.steps == config.recipe.steps
            report, evaluation = trainer.steps % config.log_every == 0 or last, self._evaluation_is_due()
            save = stop or last or evaluation or trainer.steps % config.checkpoint_every == 0
            if report or save:
                self.losses.read()
            self._seconds += time.perf_counter() - start
            self.log.advance()
            if report:
                self._report(rates)
            if save:
                self._save_checkpoint()
            if evaluation and not stop:
                self._evaluate()
                stop = any_process(interruption.signal is not None) and not last
            if stop:
                return False
        return True

    def _report(self, learning_rates: dict[str, float]) -> None:
        trainer, device = self.trainer, self.processes.device
        if device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(device) / 2**30
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        extra = {
            "learning_rates": learning_rates,
            "images_per_second": self._timed * self.config.recipe.batch_size / self._seconds,
            "memory": memory,
        }
        self._seconds, self._timed = 0.0, 0
        self.log.training(trainer.steps, self.config.recipe.steps, self.losses.take_mean(), extra)

    def _network(self) -> PretrainedModel:
        """The network to evaluate and save. Every process must call this."""
        return cast(PretrainedModel, self.trainer.network())

    def _evaluation_is_due(self) -> bool:
        step, every = self.trainer.steps, self.config.eval_every
        if self.val_set is None or step == self.evaluated:
            return False
        return step == self.config.recipe.steps or (every > 0 and step > 0 and step % every == 0)

    def _evaluate(self) -> None:
        model, step = self._network(), self.trainer.steps
        assert self.val_set is not None
        with random_state_kept():
            found = evaluate(
                model,
                self.val_set,
                batch_size=min(EVALUATION_BATCH, self.config.recipe.batch_size),
                workers=self.config.workers,
                precision=self.config.precision,
                boundary_share=None,
            )
        per_class = {
            name: dict(zip(found.class_names, values, strict=True)) for name, values in found.per_class.items()
        }
        score = found.numbers[self.score if self.score in found.numbers else "mIoU"]
        if in_main(lambda: score > self.folder.best_score()):
            in_main(lambda: self._save(model, self.folder.best, found.numbers))
            in_main(lambda: write_json(self.folder.score, {"step": step, "score": score, "evaluation": found.numbers}))
        # The record is written last, so that a resumed run repeats an interrupted evaluation.
        self.log.evaluation(step, found.numbers, per_class)
        self.evaluated = step
        if step < self.config.recipe.steps:  # the last ones are drawn at the end of the run
            in_main(self._draw_curves)

    def _draw_curves(self) -> None:
        try:
            draw_curves(MetricsFile(self.folder.metrics).read(), self.folder.curves, tuple(SCORES.values()))
        except ImportError:
            self.log.say(f"no {self.folder.curves.name}: {INSTALL}")

    def _save_checkpoint(self) -> None:
        trainer, random = self.trainer, [random_state()]
        if together():
            random *= self.processes.world_size
            dist.all_gather_object(random, random_state())
        state = {
            "model": self.model_config.to_dict(),
            "trainer": trainer.state_dict(),
            "random": random,
            "losses": self.losses.values,
            "samples": len(self.train_set),
        }
        in_main(lambda: save_checkpoint(self.folder.checkpoints, trainer.steps, state))

    def _restore(self, state: dict[str, Any]) -> list[dict[str, float]]:
        samples = state.get("samples", len(self.train_set))
        if samples != len(self.train_set):
            raise ValueError(
                f"{self.config.data} has {len(self.train_set)} samples to train on; the run began with {samples}"
            )
        self.trainer.load_state_dict(state["trainer"])
        rank, steps = self.processes.rank, self.trainer.steps
        if rank < len(state["random"]):
            set_random_state(state["random"][rank])
        else:
            seed_all(int(np.random.SeedSequence([self.config.seed, rank, steps]).generate_state(1)[0]))
        return state["losses"]

    def _evaluations(self) -> dict[int, dict[str, float]]:
        """The scores of all evaluations, by step."""
        records = MetricsFile(self.folder.metrics).read()
        return {record["step"]: record["evaluation"] for record in records if "evaluation" in record}

    def _save(self, network: PretrainedModel, folder: Path, numbers: Mapping[str, float | None]) -> None:
        """Saves the network with a card that says how it was trained, and its scores."""
        config = self.config
        recipe = {"steps taken": self.trainer.steps, **config.recipe.to_dict()}
        recipe |= {name: getattr(config, name) for name in ("precision", "seed")}
        starts = {name: _public_name(getattr(config, name)) for name in ("pretrained", "pretrained_backbone")}
        recipe |= {name: start for name, start in starts.items() if start}
        data = _public_name(config.data)
        metrics = {name: value for name, value in numbers.items() if value is not None}
        card = ModelCard(data, recipe, metrics, f"{data}, split {config.val_split}" if metrics else "")
        network.save_pretrained(folder, card)

    def _write_result(self) -> None:
        self._draw_curves()
        evaluations = list(self._evaluations().values())
        write_json(
            self.folder.result,
            {"steps": self.trainer.steps, "evaluation": evaluations[-1] if evaluations else {}},
        )

    def _say_what_begins(self, name: str, checkpoint: Path | None) -> None:
        config, processes = self.config, self.processes
        parameters = sum(parameter.numel() for parameter in self.trainer.model.parameters()) / 1e6
        self.log.say(
            f"{name} with {parameters:.2f} million parameters; batches of {config.recipe.batch_size} "
            f"from {len(self.train_set)} samples, {config.precision}; {processes.world_size} x {processes.device}"
        )
        for note in self.notes:
            self.log.say(note)
        if checkpoint is not None:
            self.log.say(f"continuing from {checkpoint}")


def _public_name(source: str) -> str:
    """The name of a data set or of weights for people elsewhere: of a path or address only the last part."""
    if source.startswith("pipe:"):
        return "shards"  # the command may hold a password
    return Path(source.partition("?")[0]).name if is_url(source) or os.path.isabs(source) else source


def _start_model(config: TrainingConfig) -> PretrainedModel:
    """The network before the first step."""
    modules = {"pretrained_backbone": config.pretrained_backbone} if config.pretrained_backbone else {}
    model = model_from_dict(config.model.to_dict(), **modules)
    if config.pretrained:
        start = load_model(config.pretrained, num_classes=config.model.num_classes, ignore_mismatched_sizes=True)
        try:
            model.load_state_dict(start.state_dict())
        except RuntimeError as error:
            raise ValueError(f"pretrained {config.pretrained} does not fit the model: {error}") from error
    return model


def _result(folder: RunFolder) -> TrainingResult:
    result, score = read_json(folder.result, {}), read_json(folder.score, {})
    return TrainingResult(
        folder.root,
        folder.model,
        folder.best if score else None,
        result["evaluation"],
        score.get("evaluation", {}),
        score.get("step"),
    )
