"""The samples of the status page: rates add up to the counters, quantiles are Prometheus', polls add up to the whole."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import Counter
from itertools import accumulate, pairwise
from math import ceil
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tracker_daemon.books import Books
from tracker_daemon.daemon.history import Columns, History, Sample, quantile
from tracker_daemon.flush_numbers import SECONDS, FlushNumbers
from tracker_daemon.readings import Reading

PROPERTY = settings(deadline=None, database=None)
NOW = 1_700_000_000.0

counts = st.integers(0, 10**6)
buckets = st.lists(st.sampled_from([0, 0, 0, 1, 2, 7, 10**6]), min_size=len(SECONDS) + 1, max_size=len(SECONDS) + 1)
elapsed = st.floats(0.01, 100)
FIELDS = tuple(Sample.__slots__)


def reading(
    accepted: dict[str, int] | None = None,
    applied: dict[str, int] | None = None,
    *,
    numbers: FlushNumbers | None = None,
    queue: tuple[int, int] = (0, 0),
) -> Reading:
    """Return a reading of these counters; *queue* in threads and calls."""
    books = Books(
        accepted=accepted or {},
        applied=applied or {},
        dead_lettered={},
        lost={},
        queue_calls=queue[1],
        threads=queue[0],
        oldest_at=0,
        rows_skipped=0,
    )
    return Reading(books=books, rejected={}, numbers=numbers or FlushNumbers(), queue_limit=1_000)


def fed(size: int, first: int = 0) -> History:
    """Return a history that took *size* samples of one second, of 1 call, 2 calls and so on."""
    history, total = History(), 0
    for number in range(first, first + size + 1):
        total += number
        history.add(
            reading({"record_turn": total}, queue=(number, 2 * number)), at=NOW + number, monotonic=float(number)
        )
    return history


def lengths(columns: Columns) -> set[int]:
    """Return how long the columns are."""
    return {len(columns[name]) for name in FIELDS}  # type: ignore[literal-required]


def test_the_first_reading_is_only_a_base() -> None:
    """What a process did before the page's first second is no rate."""
    history = History()
    assert lengths(history.columns()) == {0}
    history.add(reading({"record_turn": 10**6}), at=NOW, monotonic=5.0)
    assert history.columns()["at"] == []
    history.add(reading({"record_turn": 10**6 + 30}, {"record_turn": 5}), at=NOW + 2, monotonic=7.0)
    columns = history.columns()
    assert (columns["at"], columns["accepted"], columns["applied"]) == ([NOW + 2], [15.0], [2.5])


def test_the_last_five_minutes_are_kept() -> None:
    """300 samples stay, the newest ones, whatever came before."""
    columns = fed(1_000).columns()
    assert lengths(columns) == {300}
    assert columns["at"] == [NOW + number for number in range(701, 1_001)]
    assert columns["accepted"] == columns["queue_threads"] == list(range(701, 1_001))
    assert columns["queue_calls"] == [2 * number for number in range(701, 1_001)]


def test_columns_are_json() -> None:
    """The document has no infinity and no NaN, and instants survive it to the digit."""
    history = History(interval=0.5)
    history.add(reading(), at=NOW + 0.1 + 0.2, monotonic=0.0)
    history.add(reading(), at=NOW + 1 / 3, monotonic=1.0)
    columns = history.columns()
    assert columns["interval"] == 0.5
    again = json.loads(json.dumps(columns, allow_nan=False))
    assert again == columns
    assert history.columns(again["at"][-1])["since"] == again["at"][-1]


@settings(PROPERTY, max_examples=200)
@given(st.lists(st.tuples(elapsed, counts, counts, counts), min_size=1, max_size=40))
def test_rates_add_up_to_the_counters(steps: list[tuple[float, int, int, int]]) -> None:
    """Each rate times the time it was taken over is what the counters gained, over all kinds of call."""
    history, accepted, applied, monotonic = History(), Counter[str](), Counter[str](), 100.0
    history.add(reading(accepted, applied), at=NOW, monotonic=monotonic)
    for passed, turns, ensures, done in steps:
        monotonic += passed
        accepted.update({"record_turn": turns, "ensure_conversation": ensures})
        applied.update({"record_turn": done})
        history.add(reading(dict(accepted), dict(applied)), at=NOW + monotonic, monotonic=monotonic)
    columns = history.columns()
    assert len(columns["at"]) == len(steps)
    for rate, applied_rate, (passed, turns, ensures, done) in zip(
        columns["accepted"], columns["applied"], steps, strict=True
    ):
        assert rate * passed == pytest.approx(turns + ensures, abs=0.001 * passed + 1e-6)
        assert applied_rate * passed == pytest.approx(done, abs=0.001 * passed + 1e-6)


@settings(PROPERTY, max_examples=200)
@given(st.lists(st.tuples(counts, counts), min_size=2, max_size=20))
def test_a_counter_that_went_back_was_started_again(totals: list[tuple[int, int]]) -> None:
    """Rates are never negative: counters of which one is below its last value count from 0, all of them."""
    history = History()
    for number, (turns, ensures) in enumerate(totals):
        values = {"record_turn": turns, "ensure_conversation": ensures}
        history.add(reading(values), at=NOW + number, monotonic=float(number))
    expected = [
        sum(new) if new[0] < old[0] or new[1] < old[1] else sum(new) - sum(old) for old, new in pairwise(totals)
    ]
    assert history.columns()["accepted"] == expected


def test_a_histogram_that_went_back_was_started_again() -> None:
    """After a restart its observations are those since then."""
    history, before, after = History(), FlushNumbers(), FlushNumbers()
    for _ in range(10):
        before.flush_seconds.observe(50.0)
    after.flush_seconds.observe(0.001)
    history.add(reading(numbers=before), at=NOW, monotonic=0.0)
    history.add(reading(numbers=after), at=NOW + 1, monotonic=1.0)
    assert history.columns()["flush_p99"] == [pytest.approx(0.001, rel=0.02)]


def test_quantiles_are_of_one_interval() -> None:
    """Slow flushes show in their second and not after; a second without a flush has no latency, rather than 0.

    The numbers are one object that goes on changing, as the worker's do.
    """
    history, numbers = History(), FlushNumbers()
    for second, values in enumerate([(9.0,), (0.002, 0.002), (), (4.0,), (0.002,)]):
        for value in values:
            numbers.flush_seconds.observe(value)
            numbers.commit_lag_seconds.observe(value * 2)
        history.add(reading(numbers=numbers), at=NOW + second, monotonic=float(second))
    columns = history.columns()
    assert columns["flush_p50"] == [0.00175, None, 3.75, 0.00175]
    assert columns["flush_p99"] == [pytest.approx(0.002485), None, pytest.approx(4.975), pytest.approx(0.002485)]
    assert columns["commit_lag_p99"] == [pytest.approx(0.004975), None, pytest.approx(9.95), pytest.approx(0.004975)]


def prometheus_quantile(share: float, bounds: tuple[float, ...], each: list[int]) -> float | None:
    """`bucketQuantile` of promql/quantile.go, line by line, on cumulative buckets."""
    upper, cumulative = [*bounds, float("inf")], list(accumulate(each))
    observations = cumulative[-1]
    if observations == 0:
        return None
    rank = share * observations
    b = bisect_left(cumulative[:-1], rank)
    if b == len(upper) - 1:
        return upper[-2]
    if b == 0 and upper[0] <= 0:
        return upper[0]
    start, end, count = 0.0, upper[b], cumulative[b]
    if b > 0:
        start = upper[b - 1]
        count -= cumulative[b - 1]
        rank -= cumulative[b - 1]
    return start + (end - start) * (rank / count)


@settings(PROPERTY, max_examples=500)
@example(0.5, [0] * (len(SECONDS) + 1))
@example(0.99, [0] * len(SECONDS) + [3])
@example(0.5, [1, 0, 1] + [0] * (len(SECONDS) - 2))
@given(st.floats(0.001, 1), buckets)
def test_quantile_is_that_of_prometheus(share: float, each: list[int]) -> None:
    """A dashboard's `histogram_quantile` and the page say the same."""
    assert quantile(share, SECONDS, each) == pytest.approx(prometheus_quantile(share, SECONDS, each))


@settings(PROPERTY, max_examples=200)
@given(st.lists(st.floats(0, 59.9), min_size=1, max_size=200), st.sampled_from([0.5, 0.9, 0.99]))
def test_quantile_is_in_the_bucket_of_the_true_one(values: list[float], share: float) -> None:
    """It errs by no more than the width of a bucket."""
    numbers = FlushNumbers()
    for value in values:
        numbers.flush_seconds.observe(value)
    found = quantile(share, SECONDS, numbers.flush_seconds.counts)
    true = sorted(values)[ceil(share * len(values)) - 1]
    bucket = bisect_left(SECONDS, true)
    assert found is not None
    assert (SECONDS[bucket - 1] if bucket else 0) - 1e-9 <= found <= SECONDS[bucket] + 1e-9


class Page:
    """What the page does with answers: append what follows its last sample, else begin anew."""

    def __init__(self) -> None:
        self.kept: dict[str, list[Any]] = {name: [] for name in FIELDS}

    def poll(self, history: History) -> int:
        """Ask for what is newer; return how many samples came."""
        since = self.kept["at"][-1] if self.kept["at"] else None
        columns = json.loads(json.dumps(history.columns(since)))
        assert columns["since"] in (since, None)
        for name in FIELDS:
            self.kept[name] = (self.kept[name] if columns["since"] is not None else []) + columns[name]
        return len(columns["at"])


clock_steps = st.sampled_from([1.0, 1.0, 1.0, 1.0, 0.7, 60.0, 0.0, -0.4, -5.0, -3600.0, 3600.0])
"""Seconds by which the wall clock moves in one second; the milliseconds never repeat."""


@settings(PROPERTY, max_examples=300)
@given(st.lists(st.tuples(clock_steps, st.booleans()), max_size=40), st.integers(1, 12))
def test_polls_add_up_to_the_whole(steps: list[tuple[float, bool]], size: int) -> None:
    """A page that asks at any moments for what is newer ends with the samples of one that asks for all.

    It may know older ones that have left the window since; never one twice, and none of a future that a step of the
    wall clock took back.
    """
    history, page, at = History(size=size), Page(), NOW
    for number, (step, asks) in enumerate(steps):
        at = round(at + step + 0.001, 3)
        history.add(reading({"record_turn": number**2}, queue=(number, 0)), at=at, monotonic=float(number))
        assert all(earlier < later for earlier, later in pairwise(history.columns()["at"]))
        if asks:
            page.poll(history)
    page.poll(history)
    whole = history.columns()
    kept = len(whole["at"])
    assert kept <= size
    for name in FIELDS:
        assert page.kept[name][len(page.kept[name]) - kept :] == whole[name]  # type: ignore[literal-required]
    assert len(set(page.kept["at"])) == len(page.kept["at"])
    assert page.poll(history) == 0 or kept == 0


@pytest.mark.parametrize("since", [None, NOW - 50, NOW + 1e9, NOW + 3.0005, float("nan"), float("inf")])
def test_an_unknown_instant_gets_everything(since: float | None) -> None:
    """One of another daemon, of before the window, of the future, of no sample: all samples, said to be all."""
    columns = fed(10).columns(since)
    assert columns["since"] is None
    assert lengths(columns) == {10}


def test_a_known_instant_gets_what_is_newer() -> None:
    """The newest gets nothing, the one before it one sample, and so on."""
    history = fed(10)
    for newer in range(10):
        columns = history.columns(NOW + 10 - newer)
        assert columns["since"] == NOW + 10 - newer
        assert lengths(columns) == {newer}


def test_readings_of_one_instant() -> None:
    """Where no time passed there is no rate: the second reading is left out, and what it saw comes with the next."""
    history = fed(1)
    history.add(reading({"record_turn": 500}), at=NOW + 1, monotonic=1.0)
    history.add(reading({"record_turn": 501}), at=NOW + 2, monotonic=2.0)
    assert history.columns()["accepted"] == [1.0, 500.0]
