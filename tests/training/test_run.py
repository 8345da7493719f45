"""What a run reads, refuses, writes and says."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastmask.data import CLASS_NAMES, STUFF_LABELS, open_dataset
from fastmask.files import read_json, write_json
from fastmask.models import MaskFormer, load_model, make_model
from fastmask.models._pixels import per_pixel_loss
from fastmask.models._registry import make_config
from fastmask.targets import Targets
from fastmask.training import Recipe, TrainingConfig, make_training_config, runner, train
from fastmask.training.curves import draw_curves
from fastmask.training.latest_losses import LossRecord
from fastmask.training.run_folder import MetricsFile
from fastmask.training.step_checkpoints import load_newest
from tests.helpers.dataset_trees import instance_tree, panoptic_tree
from tests.helpers.training_runs import scene_folder, tiny_config


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return scene_folder(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def finished(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    config = tiny_config(scenes, 5, workers=0, log_every=2, eval_every=2, checkpoint_every=3, accumulate=2)
    return train(config, folder)


def test_a_run_leaves_everything_that_it_promises(finished):
    folder = finished.folder
    names = {path.name for path in folder.iterdir()}
    files = {".lock", "config.json", "log.txt", "metrics.jsonl", "curves.png", "result.json"}
    assert names == files | {"checkpoints", "model", "best", "tensorboard"}
    model = load_model(folder)  # the best
    assert model.config.class_names == CLASS_NAMES
    assert model.config.stuff_classes == STUFF_LABELS
    assert load_model(folder / "model").config == model.config
    assert Image.open(folder / "curves.png").size == (1365, 520)
    assert finished.best_step in (2, 4, 5)
    assert finished.best_evaluation["mIoU"] >= finished.evaluation["mIoU"]
    state = load_newest(folder / "checkpoints")[1]
    weights = load_model(folder / "model").state_dict()
    assert all(torch.equal(weights[name], value) for name, value in state["trainer"]["model"].items())


def test_model_cards_say_how_the_networks_were_trained(finished, scenes):
    for name, steps, numbers in (
        ("model", 5, finished.evaluation),
        ("best", finished.best_step, finished.best_evaluation),
    ):
        text = (finished.folder / name / "README.md").read_text(encoding="utf-8")
        assert f"| steps taken | {steps} |" in text and "| steps | 5 |" in text and "| precision | float32 |" in text
        assert f"| mIoU | {100 * numbers['mIoU']:.2f} % |" in text
        assert f'"value": {round(numbers["mIoU"], 4)}' in text
        assert f"On {scenes.name}, split val:" in text and f'datasets: ["{scenes.name}"]' in text
        assert str(scenes) not in text, "a card does not tell the paths of the machine"
        assert text.count("Not stated.") == 1 and text.rstrip().endswith("## License\n\nNot stated.")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("composed:scenes", "composed:scenes"),
        ("/data/my streets", "my streets"),
        ("https://host/a/train-{0..9}.tar?key=secret", "train-{0..9}.tar"),
        ("pipe:curl -H 'key: secret' https://host/train-0.tar", "shards"),
        ("microsoft/swin-tiny", "microsoft/swin-tiny"),
        ("", ""),
    ],
)
def test_cards_keep_paths_and_passwords_to_themselves(source, name):
    assert runner._public_name(source) == name


def test_every_number_is_recorded(finished):
    records = MetricsFile(finished.folder / "metrics.jsonl").read()
    training = [record for record in records if "loss" in record]
    evaluations = [record for record in records if "evaluation" in record]
    assert [record["step"] for record in training] == [2, 4, 5]
    assert [record["step"] for record in evaluations] == [2, 4, 5]
    for record in training:
        parts = record["loss_ce"] + record["loss_mask"] + record["loss_dice"]
        assert record["loss"] == pytest.approx(parts)
        assert set(record["learning_rates"]) >= {"backbone/weights", "head/weights"}
        assert min(record["gradient_norm"], record["images_per_second"], record["memory"]) > 0
    # Of the step itself, not of the next one: the second of five, by the poly schedule.
    assert training[0]["learning_rates"]["head/weights"] == pytest.approx(1e-3 * (1 - 1 / 5) ** 0.9)
    assert finished.evaluation == evaluations[-1]["evaluation"]
    assert list(evaluations[0]["per_class"]["IoU"]) == list(CLASS_NAMES)
    log = (finished.folder / "log.txt").read_text()
    for said in ("step 2/5  loss", "images/s", "mIoU", "finished: the network is in"):
        assert said in log


def test_tensorboard_has_the_scalars(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(finished.folder / "tensorboard"))
    board.Reload()
    assert {"loss/loss", "loss/loss_ce", "evaluation/mIoU", "learning_rate/head/weights"} <= set(
        board.Tags()["scalars"]
    )
    assert [event.step for event in board.Scalars("loss/loss")] == [2, 4, 5]


def test_config_json_reproduces_the_run(finished, tmp_path):
    config = TrainingConfig.load(finished.folder / "config.json")
    assert TrainingConfig.from_dict(config.to_dict()) == config
    again = train(config.replace(eval_every=0), tmp_path / "again")
    ours, theirs = (load_model(result.model).state_dict() for result in (finished, again))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_broken_files_of_all_splits_are_named_and_nothing_is_written(tmp_path):
    data = scene_folder(tmp_path / "data", 4, 2)
    config = tiny_config(data)
    (data / "annotations/train/001.png").unlink()
    (data / "images/train/003.png").write_bytes(b"no picture")
    (data / "images/val/001.png").write_bytes((data / "images/val/001.png").read_bytes()[:300])
    with pytest.raises(ValueError) as error:
        train(config, tmp_path / "run")
    for name in ("001.png", "003.png", "val/001.png", "split 'train'", "split 'val'"):
        assert name in str(error.value)
    assert not (tmp_path / "run").exists()


def test_what_the_truth_holds_is_in_the_log(tmp_path):
    """Masks stored as 0 and 255, of which a network learns the background alone, at a perfect mIoU."""
    data = scene_folder(tmp_path / "data", 2, 1)
    (data / "classes.json").write_text('["bg", "fg"]')
    for path in (data / "annotations").rglob("*.png"):
        mask = np.zeros((64, 64), np.uint8)
        mask[:16] = 255
        Image.fromarray(mask).save(path)
    train(tiny_config(data, 1, workers=0), tmp_path / "run")
    log = (tmp_path / "run" / "log.txt").read_text()
    for split in ("train", "val"):
        said = f"split '{split}': 25.0 % of the pixels are void; no pixel of 1 of 2 classes: fg; only 0 (bg) and void"
        assert said in log


def test_invalid_polygons_are_skipped_in_every_split(tmp_path):
    pytest.importorskip("pycocotools")
    data = instance_tree(tmp_path / "data")
    path = data / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["segmentation"] = [[1, 2, 3, 4]]
    path.write_text(json.dumps(content))
    config = tiny_config(data, 1, workers=0, val_split="train")
    with pytest.raises(ValueError, match="at least three points"):
        train(config, tmp_path / "run")
    with pytest.warns(UserWarning, match="invalid polygons that are skipped: 1"):
        train(config.replace(skip_invalid=True), tmp_path / "run")


def test_classes_must_be_those_of_the_data(scenes, tmp_path, monkeypatch):
    config = tiny_config(scenes)
    model = config.model.replace(num_classes=3, class_names=(), stuff_classes=())
    with pytest.raises(ValueError, match="classes of model are not the 13 classes"):
        train(config.replace(model=model), tmp_path / "run")

    def other_classes_in_val(data, split, *options, **more):
        other = scene_folder(tmp_path / split, 1, 1)
        if split == "val":
            (other / "classes.json").write_text(json.dumps([*CLASS_NAMES, "hat"]))
        return open_dataset(other, split, *options, **more)

    monkeypatch.setattr("fastmask.training.runner.open_dataset", other_classes_in_val)
    with pytest.raises(ValueError, match="classes of split 'val' are not those of split 'train'"):
        train(config, tmp_path / "run")


def test_pictures_of_any_size_and_without_any_target(tmp_path):
    data = scene_folder(tmp_path / "data", 4, 2, sizes=((40, 90), (64, 64), (80, 33)))
    for i in range(2):
        Image.new("L", (90, 40) if i == 0 else (64, 64), 255).save(data / f"annotations/train/{i:03d}.png")
    config = tiny_config(data, 4, workers=0, recipe={"crop": (96, 48), "batch_size": 3, "augmentation": "semantic"})
    assert train(config, tmp_path / "run").evaluation["mIoU"] is not None
    config = tiny_config(data, 2, workers=0, recipe={"augmentation": "none"}, val_split="")
    result = train(config, tmp_path / "whole")
    assert (result.best, result.evaluation) == (None, {})


def test_nothing_but_void_is_no_failure(tmp_path):
    data = scene_folder(tmp_path / "data", 2, 1)
    for path in (data / "annotations").rglob("*.png"):
        Image.new("L", (64, 64), 255).save(path)
    result = train(tiny_config(data, 2, workers=0), tmp_path / "run")
    assert result.best is None
    assert result.evaluation["mIoU"] is None


@pytest.mark.slow
@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_other_tasks(tmp_path, monkeypatch, task):
    """The embedded scenes, a few of them."""
    monkeypatch.setattr("fastmask.data.composed.scenes.DEFAULT_LENGTHS", {"train": 4, "val": 2})
    pytest.importorskip("pycocotools")
    config = tiny_config("composed:scenes", 2, workers=0, task=task, precision="bfloat16")
    result = train(config, tmp_path / "run")
    assert ({"panoptic": "PQ", "instance": "AP"}[task]) in result.evaluation


@pytest.mark.parametrize("model", ["segmenter-tiny", "per-pixel-tiny"])
def test_other_networks(scenes, tmp_path, model):
    fields = {"decoder_layers": 1} if model == "per-pixel-tiny" else {}
    config = make_training_config(
        scenes,
        model,
        model_fields=fields,
        recipe_fields={"steps": 2, "warmup_steps": 0, "batch_size": 2, "crop": (32, 32), "short_side": 64},
        workers=0,
    )
    assert config.recipe.optimizer == ("sgd" if model == "segmenter-tiny" else "adamw")
    assert config.task == "semantic"
    assert "mIoU" in train(config, tmp_path / "run").evaluation


def test_a_network_to_start_from(finished, tmp_path):
    data = scene_folder(tmp_path / "data", 2, 1)
    config = TrainingConfig.load(finished.folder / "config.json")
    recipe = config.recipe.replace(steps=1, learning_rate=1e-12)
    same = make_training_config(data, pretrained=str(finished.folder), recipe=recipe, val_split="", workers=0)
    assert same.model == config.model
    weights = load_model(train(same, tmp_path / "same").model).state_dict()
    start = load_model(finished.folder).state_dict()
    assert all(
        torch.allclose(weights[name], start[name]) for name in start if "running" not in name and "num_" not in name
    )

    (data / "classes.json").write_text(json.dumps([*CLASS_NAMES, "hat"]))
    more = make_training_config(data, pretrained=str(finished.folder), recipe=recipe, val_split="", workers=0)
    assert more.model.num_classes == 14
    with pytest.warns(UserWarning, match="started at random: predictor.class_embed.bias"):
        weights = load_model(train(more, tmp_path / "more").model).state_dict()
    assert torch.allclose(weights["predictor.query_embed.weight"], start["predictor.query_embed.weight"])
    with pytest.raises(ValueError, match="does not fit the model"):
        train(more.replace(model=more.model.replace(num_queries=30)), tmp_path / "other")


def test_losses_that_are_not_finite_stop_the_run_and_spare_the_checkpoint(scenes, tmp_path, monkeypatch):
    forward = MaskFormer.forward
    calls = []

    def diverging(model, images, targets=None):
        losses = forward(model, images, targets)
        calls.append(targets is not None)
        return losses if sum(calls) != 4 else {**losses, "loss_ce": losses["loss_ce"] * torch.nan}

    monkeypatch.setattr(MaskFormer, "forward", diverging)
    config = tiny_config(scenes, 8, workers=0, log_every=100, checkpoint_every=3, val_split="")
    with pytest.raises(FloatingPointError, match=r"diverged: at step 4, loss nan, loss_ce nan, loss_mask \d"):
        train(config, tmp_path / "run")
    path, state = load_newest(tmp_path / "run" / "checkpoints")
    assert path.name == "step-00000003.pt"
    assert all(value.isfinite().all() for value in state["trainer"]["model"].values())
    monkeypatch.undo()
    assert train(None, tmp_path / "run", resume=True).model.is_dir()


def test_losses_are_read_together_and_checked():
    record = LossRecord(10, [{"loss": 1.0, "gradient_norm": 2.0}], may_overflow=True)
    for value in (2.0, 3.0):
        record.append({"loss": torch.tensor(value), "gradient_norm": torch.tensor(torch.inf)})
    assert len(record.values) == 1
    record.read()
    record.read()
    assert record.take_mean() == {"loss": 2.0, "gradient_norm": 2.0}
    assert record.take_mean() == {}
    record = LossRecord(10)
    record.append({"loss": torch.tensor(1.0), "gradient_norm": torch.tensor(1.0)})
    record.append({"loss": torch.tensor(1.0), "gradient_norm": torch.tensor(torch.nan)})
    with pytest.raises(FloatingPointError, match="at step 12, loss 1, gradient_norm nan"):
        record.read()


def test_curves_of_whatever_there_is(tmp_path):
    draw_curves([], tmp_path / "empty.png", ["mIoU"])
    draw_curves([{"step": 1, "loss": None}, {"step": 2, "evaluation": {"mIoU": None}}], tmp_path / "none.png", ["mIoU"])
    assert {path.name for path in tmp_path.iterdir()} == {"empty.png", "none.png"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "half"}, "precision is 'half'; expected one of 'float32', 'bfloat16', 'float16'"),
        ({"strategy": "dp"}, "strategy is 'dp'; expected one of 'ddp', 'fsdp'"),
        ({"task": "depth"}, "task is 'depth'"),
        ({"accumulate": 3}, "accumulate is 3; expected a divisor of the recipe's batch_size 2"),
        ({"workers": -1}, "workers is -1; expected at least 0"),
        ({"seed": 0.5}, "seed must be of type int"),
        ({"model": {"type": "MaskFormer"}}, "model: .*missing keys num_classes"),
        ({"model": {"type": "MaskFormer", "num_classes": 2, "queries": 1}}, "model: .*unknown keys queries"),
        ({"model": {"type": "SoundEventDetector", "num_classes": 2}}, "model is SoundEventConfig; expected the config"),
        ({"recipe": {"steps": 0}}, "recipe: steps is 0"),
        ({"recipe": 5}, "recipe must be a configuration or a dict, got 5"),
        ({"step": 5}, "not a TrainingConfig: unknown keys step"),
    ],
)
def test_a_wrong_configuration_is_told_by_field(scenes, change, message):
    values = tiny_config(scenes).to_dict()
    with pytest.raises((ValueError, TypeError), match=message):
        TrainingConfig.from_dict({**values, **change})


@pytest.mark.parametrize("model", ["tiny", "segmenter-tiny", "per-pixel-tiny"])
def test_more_classes_than_a_byte_holds(tmp_path, model):
    for split in ("train", "val"):
        for folder in ("images", "annotations"):
            (tmp_path / "data" / folder / split).mkdir(parents=True)
        rng = np.random.default_rng(0)
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / f"data/images/{split}/a.png")
        labels = rng.choice(np.array([0, 255, 299, 65535], np.uint16), (64, 64))
        Image.fromarray(labels).save(tmp_path / f"data/annotations/{split}/a.png")
    (tmp_path / "data/classes.json").write_text(json.dumps([f"class {k}" for k in range(300)]))
    recipe = Recipe(steps=1, batch_size=2, crop=(64, 64), short_side=64)
    train(make_training_config(tmp_path / "data", model, recipe, workers=0), tmp_path / "run", device="cpu")
    result = read_json(tmp_path / "run/result.json")
    assert 0 <= result["evaluation"]["pixel_accuracy"] <= 1


def test_void_pixels_count_in_no_loss():
    """What a network says where nothing is labeled changes no loss; of MaskFormer only with the authors' rule."""
    segments = torch.tensor([0, 1]).repeat_interleave(16).expand(32, 32).clone()
    segments[:16] = 255
    targets = Targets.from_segments(segments[None].to(torch.uint8), [torch.tensor([1, 0])], void=255)
    outputs = {"class_logits": torch.randn(3, 1, 25, 3), "mask_logits": torch.randn(3, 1, 25, 8, 8)}
    changed = {**outputs, "mask_logits": outputs["mask_logits"].clone()}
    changed["mask_logits"][..., :3, :] += 5 * torch.randn(3, 1, 25, 3, 8)  # row 3 reaches labeled pixels
    for ignore in (True, False):
        criterion = make_model("tiny", 2, ignore_void=ignore).criterion
        before, after = (sum(criterion(each, targets).values()).item() for each in (outputs, changed))
        assert (before == pytest.approx(after, rel=1e-5)) == ignore
    logits = outputs["mask_logits"][0, :, :2]
    classes = targets.class_map(255)
    assert per_pixel_loss(logits, classes, 255) == pytest.approx(
        per_pixel_loss(changed["mask_logits"][0, :, :2], classes, 255).item(), rel=1e-5
    )


def test_runs_of_maskformer_leave_void_out_unless_told_otherwise():
    scenes = "composed:scenes"
    assert make_training_config(scenes, "tiny").model.ignore_void
    config = make_training_config(scenes, "tiny", model_fields={"ignore_void": False})
    assert not config.model.ignore_void


def stuff_only(root):
    """Panoptic truth of which every class is stuff."""
    path = panoptic_tree(root) / "annotations/panoptic_val2017.json"
    content = json.loads(path.read_text())
    for category in content["categories"]:
        category["isthing"] = 0
    path.write_text(json.dumps(content))
    return root


def test_instances_of_data_without_things_are_refused(tmp_path):
    split = {"train_split": "val", "recipe": {"steps": 1}}
    with pytest.raises(
        ValueError, match=r"task='instance': the data set has no things, as all of its 3 classes are stuff"
    ):
        tiny_config(stuff_only(tmp_path), task="instance", **split)
    assert tiny_config(tmp_path, **split).task == "panoptic"
    assert tiny_config(tmp_path, task="semantic", **split).task == "semantic"


@pytest.mark.parametrize(("model", "name"), [("segmenter-tiny", "Segmenter"), ("per-pixel-tiny", "PerPixelBaseline")])
def test_a_network_is_not_trained_for_a_task_that_it_cannot_do(tmp_path, model, name):
    where = {"train_split": "val", "val_split": ""}
    for task in ("panoptic", "instance"):
        with pytest.raises(ValueError, match=f"task='{task}': a {name} does semantic segmentation only"):
            make_training_config(panoptic_tree(tmp_path / "panoptic"), model, task=task, **where)
    # What panoptic truth is taken for unless a task is asked for.
    config = make_training_config(tmp_path / "panoptic", model, **where)
    assert config.task == "semantic"
    with pytest.raises(ValueError, match=f"task='instance': a {name} does semantic segmentation only"):
        TrainingConfig.from_dict({**config.to_dict(), "task": "instance"})
    instances = instance_tree(tmp_path / "instances")
    with pytest.raises(ValueError, match=f"task='instance': a {name} does semantic segmentation only"):
        make_training_config(instances, model)
    classes = open_dataset(instances, "train").info.class_names
    config = TrainingConfig(
        str(instances), make_config(model, class_names=classes), config.recipe, val_split="", workers=0
    )
    with pytest.raises(ValueError, match=f"task='instance': a {name} does semantic segmentation only"):
        train(config, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_the_configuration_names_the_task_of_the_data(tmp_path):
    assert tiny_config(instance_tree(tmp_path), recipe={"steps": 1}).task == "instance"


def test_json_files_hold_names_that_are_no_unicode(tmp_path):
    """As those of files whose bytes are no UTF-8; and what is not finite."""
    write_json(tmp_path / "a.json", {"name": "\udc80", "score": float("nan")})
    assert read_json(tmp_path / "a.json") == {"name": "\udc80", "score": None}
