"""Global batches: every row once an epoch, whatever the parts, the batch, the window and the number of workers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hashray.data.images import AugmentConfig
from hashray.train.batches import WINDOW_BYTES, EpochPlan, MemorySlices, held_out, row_seeds, slice_rows

PLANS = st.builds(
    EpochPlan,
    part_rows=st.lists(st.integers(0, 9), min_size=1, max_size=6).map(tuple),
    batch_size=st.integers(1, 7),
    window_rows=st.integers(1, 20),
    seed=st.integers(0, 5),
)
EPOCHS = st.integers(0, 3)


@st.composite
def plans_by_bytes(draw: st.DrawFn) -> EpochPlan:
    """Plans whose parts hold images of any size, up to several windows' bytes each."""
    plan = draw(PLANS)
    sizes = [
        draw(st.sampled_from([0, 1, WINDOW_BYTES // 40, WINDOW_BYTES // 3, 2 * WINDOW_BYTES])) for _ in plan.part_rows
    ]
    return replace(plan, part_bytes=tuple(size * rows for size, rows in zip(sizes, plan.part_rows, strict=True)))


@given(PLANS | plans_by_bytes(), EPOCHS)
def test_every_row_exactly_once(plan: EpochPlan, epoch: int) -> None:
    batches = list(plan.batches(epoch))
    assert len(batches) == plan.steps
    assert [len(batch) for batch in batches] == [plan.batch_rows(step) for step in range(plan.steps)]
    rows = np.concatenate([np.zeros(0, np.int64), *batches])
    assert sorted(rows.tolist()) == list(range(plan.rows))
    assert np.array_equal(rows, plan.order(epoch))
    assert np.array_equal(plan.order(epoch), EpochPlan(*vars(plan).values()).order(epoch))


@given(PLANS, EPOCHS)
def test_windows_are_whole_batches(plan: EpochPlan, epoch: int) -> None:
    windows = plan.windows(epoch)
    starts = np.concatenate([[0], np.cumsum(plan.part_rows)])
    order = plan.order(epoch)
    at = 0
    for window in windows:
        assert window.first_step * plan.batch_size == at
        rows = np.concatenate([np.arange(starts[p] + a, starts[p] + b) for p, a, b in window.pieces])
        # A window is shuffled inside itself: what is read at a time is what is needed at a time.
        assert sorted(order[at : at + window.rows].tolist()) == sorted(rows.tolist())
        at += window.rows
        if window is not windows[-1]:
            assert window.rows % plan.batch_size == 0
            assert plan.window_rows <= window.rows < plan.window_rows + plan.batch_size
    assert at == plan.rows
    assert [window.index for window in windows] == list(range(len(windows)))


@given(plans_by_bytes(), EPOCHS)
def test_a_window_is_bounded_in_bytes(plan: EpochPlan, epoch: int) -> None:
    each = [held / max(1, rows) for held, rows in zip(plan.part_bytes, plan.part_rows, strict=True)]
    at = 0
    for window in plan.windows(epoch):
        assert window.first_step * plan.batch_size == at
        at += window.rows
        held = sum((stop - start) * each[part] for part, start, stop in window.pieces)
        last = plan.batch_size * max(each[part] for part, _, _ in window.pieces)
        assert held <= WINDOW_BYTES + last or window.rows <= plan.batch_size
        assert window.rows < plan.window_rows + plan.batch_size
    light = replace(plan, part_bytes=tuple(min(size, 1) for size in plan.part_bytes))
    assert light.windows(epoch) == replace(plan, part_bytes=()).windows(epoch)


@given(PLANS | plans_by_bytes(), EPOCHS, st.integers(1, 5), st.integers(0, 4))
def test_the_slices_of_all_workers_are_the_global_batch(plan: EpochPlan, epoch: int, world: int, first: int) -> None:
    n = plan.rows
    features, labels = np.arange(2 * n, dtype=np.float32).reshape(n, 2), np.arange(n, dtype=np.uint8)[:, None]
    workers = [
        MemorySlices(plan, features, labels, [str(i) for i in range(n)], AugmentConfig(), rank, world)
        for rank in range(world)
    ]
    whole = list(plan.batches(epoch, first))
    assert [b.tolist() for b in whole] == [b.tolist() for b in list(plan.batches(epoch))[first:]]
    steps = list(zip(*(member.epoch(epoch, first) for member in workers), strict=True))
    assert len(steps) == len(whole)
    for number, (slices, batch) in enumerate(zip(steps, whole, strict=True)):
        assert {piece.step for piece in slices} == {first + number}
        assert {piece.rows for piece in slices} == {len(batch)}
        assert all(len(piece.inputs) <= slice_rows(plan.batch_size, world) for piece in slices)
        assert np.array_equal(np.concatenate([piece.inputs for piece in slices]), features[batch])
        assert np.array_equal(np.concatenate([piece.labels for piece in slices]), labels[batch])


@given(PLANS, st.integers(1, 5))
def test_a_sweep_covers_every_row_once(plan: EpochPlan, world: int) -> None:
    n = plan.rows
    rows = np.arange(n, dtype=np.float32)[:, None]
    workers = [
        MemorySlices(plan, rows, np.zeros((n, 1), np.uint8), [str(i) for i in range(n)], AugmentConfig(), rank, world)
        for rank in range(world)
    ]
    seen = [row for member in workers for inputs, _ in member.scan() for row in inputs[:, 0].tolist()]
    assert sorted(seen) == list(range(n))
    assert all(len(inputs) <= plan.batch_size for member in workers for inputs, _ in member.scan())


def test_epochs_and_seeds_differ() -> None:
    plan = EpochPlan((40, 40, 40), 16, 32, 0)
    orders = [plan.order(epoch).tolist() for epoch in range(4)] + [EpochPlan((40, 40, 40), 16, 32, 1).order(0).tolist()]
    assert len({tuple(order) for order in orders}) == 5


def test_a_small_corpus_is_shuffled_whole() -> None:
    plan = EpochPlan((10, 10, 10), 4, 16_384, 0)
    assert len(plan.windows(0)) == 1
    parts = [row // 10 for row in plan.order(0)]
    assert len(set(parts[:10])) == 3


def test_augmentation_does_not_depend_on_the_number_of_workers() -> None:
    images = np.random.default_rng(0).integers(0, 256, (23, 3, 8, 8), dtype=np.uint8)
    plan = EpochPlan((12, 11), 8, 16, 3)
    ids, labels = [f"row{i}" for i in range(23)], np.zeros((23, 1), np.uint8)
    runs = []
    for world in (1, 2, 3):
        workers = [MemorySlices(plan, images, labels, ids, AugmentConfig(shift=2), r, world) for r in range(world)]
        steps = zip(*(member.epoch(1, 0) for member in workers), strict=True)
        runs.append(np.concatenate([piece.inputs for slices in steps for piece in slices]))
    assert np.array_equal(runs[0], runs[1])
    assert np.array_equal(runs[0], runs[2])
    assert not np.array_equal(runs[0], images[plan.order(1)])


def test_row_seeds() -> None:
    seeds = row_seeds(0, 0, ["a", "b"])
    assert (seeds >= 0).all()
    assert len({*seeds.tolist(), *row_seeds(1, 0, ["a"]).tolist(), *row_seeds(0, 1, ["a"]).tolist()}) == 4
    assert row_seeds(0, 0, ["b"])[0] == seeds[1]
    assert row_seeds(0, 0, []).shape == (0,)


@given(st.permutations([str(i) for i in range(12)]), st.integers(0, 20))
def test_held_out_rows_do_not_depend_on_the_order(ids: list[str], count: int) -> None:
    chosen = held_out(ids, count, 0)
    assert chosen == held_out(sorted(ids), count, 0)
    assert len(chosen) == min(count, 12)
    assert chosen <= held_out(ids, count + 1, 0)


def test_memory_slices_must_match_the_plan() -> None:
    with pytest.raises(ValueError, match="3 inputs, 3 labels, 2 ids, 3 planned"):
        MemorySlices(
            EpochPlan((3,), 2, 2, 0), np.zeros((3, 1)), np.zeros((3, 1), np.uint8), ["a", "b"], AugmentConfig(), 0, 1
        )
