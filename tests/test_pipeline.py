"""The pipeline alone: overlap, order, room, errors, the end. Its stages here are plain functions."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from collector.pipeline import Pipeline, Stage, Stopwatch

SOON = 30
"""Seconds after which a test gives up what must happen at once."""


@pytest.fixture
def pipeline_of():
    """Builds pipelines of named functions, and closes them."""
    made = []

    def build(room=3, **steps):
        made.append(Pipeline(*(Stage(name=name, step=step) for name, step in steps.items()), room=room))
        return made[-1]

    yield build
    for pipeline in made:
        pipeline.close()


class Gate:
    """A step that tells when it begins a piece, and waits until it is let through."""

    def __init__(self):
        self.began, self.open = threading.Semaphore(0), threading.Event()

    def __call__(self, piece):
        self.began.release()
        assert self.open.wait(SOON)
        return piece

    def begins(self):
        return self.began.acquire(timeout=SOON)


def test_a_piece_takes_the_stages_in_order_and_results_come_in_the_order_of_the_pieces(pipeline_of):
    pipeline = pipeline_of(read=lambda n: [n], device=lambda done: [*done, "device"], write=lambda done: [*done, "out"])
    assert list(pipeline.map(range(20))) == [[n, "device", "out"] for n in range(20)]


def test_stages_work_on_different_pieces_at_the_same_time(pipeline_of):
    """Piece 2 in the first stage meets 1 in the second and 0 in the third: one after the other they never would."""
    meeting, seen = threading.Barrier(3), []

    def meets_at(number):
        def step(piece):
            seen.append((number, piece))
            if piece == number:
                meeting.wait(SOON)
            return piece

        return step

    pipeline = pipeline_of(read=meets_at(2), device=meets_at(1), write=meets_at(0))
    assert list(pipeline.map(range(5))) == [0, 1, 2, 3, 4]
    for number in range(3):
        assert [piece for stage, piece in seen if stage == number] == [0, 1, 2, 3, 4]


def test_a_stage_has_one_thread_of_its_own_prepared_before_its_first_piece():
    prepared = []
    pipeline = Pipeline(
        Stage(name="first", step=lambda n: (n, threading.current_thread())),
        Stage(
            name="second",
            step=lambda made: (*made, threading.current_thread()),
            prepare=lambda: prepared.append(threading.current_thread()),
        ),
    )
    results = list(pipeline.map(range(6)))
    pipeline.close()
    (first,), (second,) = {result[1] for result in results}, {result[2] for result in results}
    assert first is not second
    assert threading.current_thread() not in (first, second)
    assert prepared == [second]
    assert first.name.startswith("first")


def test_several_threads_hand_in_at_once_and_each_gets_its_own_result(pipeline_of):
    pipeline = pipeline_of(double=lambda n: 2 * n, more=lambda n: n + 1)
    with ThreadPoolExecutor(8) as callers:
        assert list(callers.map(lambda n: pipeline.submit(n).result(SOON), range(100))) == [
            2 * n + 1 for n in range(100)
        ]


def test_a_slow_last_stage_holds_up_the_first_so_that_no_more_than_room_is_in_work(pipeline_of):
    read, writer = [], Gate()
    pipeline = pipeline_of(read=lambda n: read.append(n) or n, device=lambda n: n, write=writer)
    results = []
    consumer = threading.Thread(target=lambda: results.extend(pipeline.map(range(6))))
    consumer.start()
    assert writer.begins()
    consumer.join(0.2)  # long enough for everything that does not wait
    assert read == [0, 1, 2]
    assert consumer.is_alive()
    writer.open.set()
    consumer.join(SOON)
    assert results == read == [0, 1, 2, 3, 4, 5]


def test_map_takes_no_piece_before_there_is_room_for_it(pipeline_of):
    taken = []

    def pieces():
        for n in range(10):
            taken.append(n)
            yield n

    results = pipeline_of(room=2, only=lambda n: n).map(pieces())
    assert next(results) == 0
    assert taken == [0, 1, 2]


@pytest.mark.parametrize("broken", ["read", "device", "write"])
def test_an_exception_belongs_to_its_piece_alone(pipeline_of, broken):
    def step(name):
        def run(n):
            if name == broken and n == 1:
                raise OSError(f"{name} of {n}")
            return n

        return run

    pipeline = pipeline_of(**{name: step(name) for name in ("read", "device", "write")})
    futures = [pipeline.submit(n) for n in range(5)]
    with pytest.raises(OSError, match=f"{broken} of 1"):
        futures[1].result(SOON)
    assert [future.result(SOON) for n, future in enumerate(futures) if n != 1] == [0, 2, 3, 4]


def test_map_raises_where_the_result_would_come_and_the_pipeline_works_on(pipeline_of):
    pipeline = pipeline_of(invert=lambda n: 1 / n)
    results = pipeline.map([1, 2, 0, 4])
    assert [next(results), next(results)] == [1, 0.5]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert list(pipeline.map([4])) == [0.25]


def test_a_failed_piece_leaves_memory_with_its_error(pipeline_of):
    class Shard:
        pass

    def fail(_shard):
        raise ValueError

    pipeline, shard = pipeline_of(fail=fail), Shard()
    alive = weakref.ref(shard)
    gc.disable()  # what only the collector finds stays for a long time
    try:
        error = pipeline.submit(shard).exception(SOON)
        del shard
        pipeline.close()
        assert isinstance(error, ValueError)
        del error
        assert alive() is None
    finally:
        gc.enable()


def test_close_waits_for_the_running_step_fails_the_rest_and_may_be_repeated(pipeline_of):
    gate = Gate()
    pipeline = pipeline_of(read=gate, write=lambda n: n)
    futures = [pipeline.submit(n) for n in range(3)]
    assert gate.begins()
    closing = threading.Thread(target=pipeline.close)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive()
    gate.open.set()
    closing.join(SOON)
    for future in futures:
        with pytest.raises(RuntimeError, match="closed"):
            future.result(SOON)
    pipeline.close()
    assert not {t for t in threading.enumerate() if t.name.startswith(("read", "write"))}
    for _ in range(pipeline.room + 1):  # nor does it take up room
        with pytest.raises(RuntimeError, match="after shutdown"):
            pipeline.submit(0).result(SOON)


def test_a_pipeline_that_did_nothing_has_no_threads():
    before = threading.active_count()
    pipeline = Pipeline(Stage(name="only", step=lambda n: n))
    assert threading.active_count() == before
    pipeline.close()


def test_a_stopwatch_adds_up_what_a_stage_takes_even_if_it_fails():
    watch = Stopwatch()
    with watch("read"):
        pass
    first = watch.seconds["read"]
    with pytest.raises(KeyError), watch("read"):
        raise KeyError
    assert watch.seconds["read"] > first
