"""The replay of a schedule on many threads."""

from __future__ import annotations

import pytest

from benchmarks.threads import Call, longest_run


@pytest.mark.parametrize(
    ("tasks", "threads", "longest"),
    [([1, 2, 3, 4], 1, 10), ([1, 2, 3, 4], 2, 7), ([5, 1, 1, 1, 1], 4, 6), ([3, 4], 64, 4), ([], 8, 0)],
)
def test_neighbors_share_a_thread(tasks, threads, longest):
    assert longest_run(tasks, threads) == longest


def test_what_is_in_no_loop_takes_one_thread():
    call = Call(20, [[4, 4], [1, 2, 3]])
    assert call.on(1) == 20
    assert call.on(2) == 6 + 4 + 3
    assert call.on(64) == 6 + 4 + 3
