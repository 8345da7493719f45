"""The samples of a step depend on the seed and the step alone."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastmask.training.sampler import StepSampler


def samples_of_steps(length, batch_size, seed, start, stop, world_size=1, accumulate=1):
    """For each step the micro-batches of all processes."""
    ranks = [
        list(
            StepSampler(length, batch_size, seed, start, stop, rank=rank, world_size=world_size, accumulate=accumulate)
        )
        for rank in range(world_size)
    ]
    return [
        [ranks[rank][step * accumulate + micro] for micro in range(accumulate) for rank in range(world_size)]
        for step in range(stop - start)
    ]


def flat(micro_batches):
    return [sample for batch in micro_batches for sample in batch]


@given(
    length=st.integers(1, 30),
    micro_batch=st.integers(1, 4),
    world_size=st.integers(1, 4),
    accumulate=st.integers(1, 3),
    start=st.integers(0, 20),
    seed=st.integers(0, 5),
)
def test_processes_and_micro_batches_share_the_samples_of_one(length, micro_batch, world_size, accumulate, start, seed):
    batch_size = micro_batch * world_size * accumulate
    alone = samples_of_steps(length, batch_size, seed, 0, start + 4)
    shared = samples_of_steps(length, batch_size, seed, start, start + 4, world_size, accumulate)
    for expected, found in zip(alone[start:], shared, strict=True):
        assert flat(found) == flat(expected)
        assert {len(batch) for batch in found} == {micro_batch}


def test_each_epoch_has_every_sample_once_in_an_order_of_its_own():
    stream = [sample for step in samples_of_steps(10, 4, 3, 0, 10) for sample in flat(step)]
    epochs = [[i for e, i in stream if e == epoch] for epoch in range(4)]
    assert all(Counter(epoch) == Counter(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    other = [sample for step in samples_of_steps(10, 4, 4, 0, 10) for sample in flat(step)]
    assert [i for _, i in other] != [i for _, i in stream]


def test_uneven_shares_and_empty_sets_are_refused():
    with pytest.raises(ValueError, match="batch_size is 6; expected a multiple of 4: 2 processes with 2 micro-batches"):
        StepSampler(10, 6, 0, 0, 1, world_size=2, accumulate=2)
    with pytest.raises(ValueError, match="the data set has no samples"):
        StepSampler(0, 1, 0, 0, 1)
