"""Event-based F1, against a search over all matchings and against sed_eval."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastmask.metrics import SoundEventMetrics

K = 3


def clips(seed, count=15):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        true = []
        for _ in range(rng.integers(0, 5)):
            onset = rng.uniform(0, 8)
            true.append({"label": int(rng.integers(0, K)), "onset": onset, "offset": onset + rng.uniform(0.1, 4)})
        found = [
            {
                "label": event["label"] if rng.random() < 0.85 else int(rng.integers(0, K)),
                "onset": max(0.0, event["onset"] + rng.normal(0, 0.15)),
                "offset": event["offset"] + rng.normal(0, 0.3),
            }
            for event in [*true, *true[:2]]
            if rng.random() < 0.9
        ]
        yield [event for event in found if event["offset"] > event["onset"]], true


def fits(found, true):
    slack = max(0.2, 0.2 * (true["offset"] - true["onset"]))
    return (
        found["label"] == true["label"]
        and abs(found["onset"] - true["onset"]) <= 0.2
        and abs(found["offset"] - true["offset"]) <= slack
    )


def most_matches(found, true):
    """The size of the largest matching, by trying each partner of the first event and none."""
    if not true:
        return 0
    best = most_matches(found, true[1:])
    for i, event in enumerate(found):
        if fits(event, true[0]):
            best = max(best, 1 + most_matches(found[:i] + found[i + 1 :], true[1:]))
    return best


@pytest.mark.parametrize("seed", range(3))
def test_equals_a_search_over_matchings(seed):
    metrics = SoundEventMetrics(K)
    counts = np.zeros((K, 3))
    for found, true in clips(seed):
        metrics.update(found, true)
        for k in range(K):
            of_class = [[event for event in side if event["label"] == k] for side in (found, true)]
            counts[k] += (most_matches(*of_class), *map(len, of_class))
    hits, num_found, num_true = counts.sum(0)
    assert 0 < hits < min(num_found, num_true)
    expected = {
        "F1": 2 * hits / (num_found + num_true),
        "precision": hits / num_found,
        "recall": hits / num_true,
        "F1_macro": np.mean(2 * counts[:, 0] / counts[:, 1:].sum(1)),
    }
    assert metrics.compute() == pytest.approx(expected, rel=1e-12)


def test_equals_sed_eval():
    sed_eval = pytest.importorskip("sed_eval")
    names = [f"class {k}" for k in range(K + 3)]
    theirs = sed_eval.sound_event.EventBasedMetrics(
        names, t_collar=0.2, percentage_of_length=0.2, empty_system_output_handling="zero_score"
    )
    ours = SoundEventMetrics(K + 3)
    # Of the last classes one is never found, one is never there, and one is neither.
    missed, invented = ([{"label": K + k, "onset": 1.0, "offset": 2.0}] for k in range(2))
    for i, (found, true) in enumerate([*clips(9, count=30), ([], missed), (invented, [])]):
        ours.update(found, true)
        lists = [
            [
                {"event_label": names[e["label"]], "onset": e["onset"], "offset": e["offset"], "filename": f"{i}.wav"}
                for e in side
            ]
            for side in (true, found)
        ]
        import dcase_util

        theirs.evaluate(*map(dcase_util.containers.MetaDataContainer, lists))
    numbers = ours.compute()
    overall = theirs.results_overall_metrics()["f_measure"]
    assert numbers["F1"] == pytest.approx(overall["f_measure"], rel=1e-12)
    assert numbers["precision"] == pytest.approx(overall["precision"], rel=1e-12)
    assert numbers["recall"] == pytest.approx(overall["recall"], rel=1e-12)
    average = theirs.results_class_wise_average_metrics()["f_measure"]
    assert numbers["F1_macro"] == pytest.approx(average["f_measure"], rel=1e-12)


def test_collars_are_kept_to():
    true = {"labels": torch.tensor([0]), "onsets": torch.tensor([1.0]), "offsets": torch.tensor([3.0])}

    def is_found(onset, offset):
        metrics = SoundEventMetrics(1)
        metrics.update([{"label": 0, "onset": onset, "offset": offset, "score": 0.9}], true)
        return metrics.compute()["F1"] == 1

    assert is_found(1.19, 3.39)  # a fifth of two seconds is more than 200 ms
    assert is_found(0.81, 2.61)
    assert not is_found(1.21, 3.0)
    assert not is_found(1.0, 3.41)


def test_parts_add_up_and_nothing_is_nan():
    pairs = list(clips(4))
    parts = [SoundEventMetrics(K), SoundEventMetrics(K), SoundEventMetrics(K)]
    for i, pair in enumerate(pairs):
        parts[0].update(*pair)
        parts[1 + (i < 4)].update(*pair)
    assert parts[1].merge(parts[2]).compute() == parts[0].compute()
    assert all(math.isnan(value) for value in SoundEventMetrics(K).compute().values())
    invented = SoundEventMetrics(2)
    invented.update([{"label": 1, "onset": 0.0, "offset": 1.0}], [])
    assert math.isnan(invented.compute()["F1_macro"])
    assert invented.per_class()["F1"][1] == 0
    silent = SoundEventMetrics(2)
    silent.update([], [{"label": 0, "onset": 0.0, "offset": 1.0}])
    assert silent.compute()["F1"] == 0
    assert math.isnan(silent.per_class()["F1"][1])


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="onset_collar must not be negative, got -1"):
        SoundEventMetrics(2, onset_collar=-1)
    with pytest.raises(ValueError, match="prediction holds class 2; expected 0..1"):
        SoundEventMetrics(2).update([{"label": 2, "onset": 0, "offset": 1}], [])
    with pytest.raises(ValueError, match="target holds an event that ends before it begins"):
        SoundEventMetrics(2).update([], [{"label": 1, "onset": 1, "offset": 0.5}])
    with pytest.raises(TypeError, match="target must be a list of events or a dict"):
        SoundEventMetrics(2).update([], 3)
