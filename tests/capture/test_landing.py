"""Results of a GPU land in memory that later batches use again, without ever sharing it while it is read."""

from __future__ import annotations

import torch

from collector.capture.landing import PinnedPool


def rooms(landing, *counts):
    return [landing.room(torch.zeros(count, 2, dtype=torch.int16)) for count in counts]


def storage(tensor):
    return tensor.untyped_storage().data_ptr()


def test_a_batch_lands_in_one_piece_once_its_size_is_known():
    pool = PinnedPool(pinned=False)
    first = rooms(pool.take(), 5, 7)
    assert storage(first[0]) != storage(first[1]), "nothing was known of its size"
    second = rooms(pool.take(), 5, 7)
    assert storage(second[0]) == storage(second[1])
    for number, part in enumerate(second):
        part.fill_(number)
    assert [part.unique().tolist() for part in second] == [[0], [1]], "side by side, not on top of each other"
    assert [tuple(part.shape) for part in second] == [(5, 2), (7, 2)]


def test_memory_is_used_again_only_after_its_release():
    pool = PinnedPool(pinned=False)
    rooms(pool.take(), 100)
    held, other = pool.take(), pool.take()
    (one,), (two,) = rooms(held, 100), rooms(other, 100)
    assert storage(one) != storage(two)
    held.release()
    held.release()
    (again,) = rooms(pool.take(), 50)
    (fresh,) = rooms(pool.take(), 50)
    assert storage(again) == storage(one)
    assert storage(fresh) not in (storage(one), storage(two))


def test_a_larger_batch_gets_larger_memory():
    pool = PinnedPool(pinned=False)
    rooms(pool.take(), 10)
    small = pool.take()
    parts = rooms(small, 10, 1000)
    assert storage(parts[0]) != storage(parts[1]), "what does not fit lands beside it"
    small.release()
    parts = rooms(pool.take(), 10, 1000)
    assert storage(parts[0]) == storage(parts[1])


def test_results_on_the_host_stay_where_they_are():
    part = torch.zeros(3)
    assert PinnedPool(pinned=False).take().copy(part) is part
    assert PinnedPool(pinned=False).take().copy(None) is None
