"""The order of reports does not depend on which trial is ready first, and no trial waits forever."""

from __future__ import annotations

import random
from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st

from hashray.tune.turns import Turns


def reports(seed: int, at_once: int, lengths: list[list[int]], fails: set[int]) -> list[tuple[str, int]]:
    """Run trials at random speeds; return the reports (trial, epochs) in order.

    Args:
        lengths: epochs between the reports of each trial.
        fails: trials that die once before a report and once after their turn has come, and then enter again.
    """
    rng = random.Random(seed)
    turns = Turns(at_once, len(lengths))
    waiting = [str(i) for i in range(len(lengths))]
    left = {str(i): list(accumulate(steps)) for i, steps in enumerate(lengths)}
    running: dict[str, bool] = {}  # trials in flight, True while they wait for their turn
    to_fail, to_fail_late = {str(i) for i in fails}, {str(i) for i in fails}
    order: list[tuple[str, int]] = []

    def begin(trial: str) -> None:
        turns.enter(trial, int(trial), left[trial][0])
        running[trial] = False

    while waiting or running:
        fresh = [waiting.pop(0) for _ in range(min(len(waiting), at_once - len(running)))]
        for trial in rng.sample(fresh, len(fresh)):  # processes start in any order
            begin(trial)
        on_the_way = sorted(trial for trial, ready in running.items() if not ready)
        if on_the_way and rng.random() < 0.7:
            trial = rng.choice(on_the_way)
            if trial in to_fail:
                to_fail.discard(trial)
                begin(trial)
            else:
                turns.arrive(trial)
                running[trial] = True
        released = turns.next()
        if released is None:
            assert on_the_way, "all trials wait and none may report"
            continue
        if released in to_fail_late and rng.random() < 0.5:
            to_fail_late.discard(released)
            begin(released)
            continue
        order.append((released, left[released].pop(0)))
        if left[released]:
            begin(released)
        else:
            del running[released]
            turns.end(released)
    return order


@given(
    st.integers(1, 5),
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=9),
    st.sets(st.integers(0, 8)),
)
def test_reports_have_one_order_at_any_speed(at_once: int, lengths: list[list[int]], fails: set[int]) -> None:
    first = reports(0, at_once, lengths, set())
    assert sorted(first) == sorted((str(i), n) for i, steps in enumerate(lengths) for n in accumulate(steps))
    for seed in range(1, 6):
        assert reports(seed, at_once, lengths, {i for i in fails if i < len(lengths)}) == first


def test_of_two_reports_due_together_the_lower_number_comes_first() -> None:
    turns = Turns(2, 2)
    turns.enter("b", 1, 3)
    turns.enter("a", 0, 3)
    turns.arrive("b")
    assert turns.next() is None
    turns.arrive("a")
    assert (turns.next(), turns.next()) == ("a", None)
    turns.enter("a", 0, 6)
    assert turns.next() == "b"


def test_a_new_trial_starts_at_the_end_of_the_previous_one() -> None:
    turns = Turns(2, 3)
    turns.enter("a", 0, 2)
    turns.enter("b", 1, 10)
    turns.arrive("a")
    assert turns.next() == "a"
    turns.end("a")
    assert turns.next() is None  # a third trial is still to come
    turns.enter("c", 2, 4)
    turns.arrive("b")
    assert turns.next() is None  # due at 10, c at 6
    turns.arrive("c")
    assert turns.next() == "c"
    turns.end("c")
    assert turns.next() == "b"


def test_members_of_a_population_report_at_once() -> None:
    turns = Turns(0, 2)
    turns.enter("a", 0, 2)
    turns.enter("b", 1, 2)
    assert turns.next() is None
    turns.arrive("b")
    assert (turns.next(), turns.next()) == ("b", None)
