"""The front door: what each argument of each call may be, and that a refusal leaves nothing behind."""

from __future__ import annotations

import copy
import enum
import pickle
from collections import Counter
from decimal import Decimal
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest.mock import MagicMock, Mock
from uuid import UUID

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from tests.strategies import AWKWARD, LONG, any_costs, names
from tracker_daemon import InvalidCall, QueueFull, Tracker, TrackerClosed, TrackerError, calls
from tracker_daemon.errors import shown
from tracker_daemon.generation import ENSURE, RESOLVE, method_of
from tracker_daemon.memory_sink import MemorySink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tracker_daemon.generation import Record


class Idle(Tracker):  # type: ignore[misc]  # final for users; here the worker is taken out
    """A tracker whose worker never starts: what is accepted stays in the queue."""

    def __init__(self, *, gate: int = 0, **options: Any) -> None:
        super().__init__(MemorySink(), registry=CollectorRegistry(), **options)
        self._worker.start = lambda: None  # type: ignore[method-assign]
        self._gate = gate

    def call(self, method: str, *arguments: Any, **named: Any) -> Any:
        """Make a call with the fast path open (`gate` is not 0) or shut."""
        self._backlog._set_gate(self._gate)
        return getattr(self, method)(*arguments, **named)

    @property
    def queued(self) -> list[tuple[Any, ...]]:
        """The arguments of the calls in the queue."""
        given = {ENSURE: 1, RESOLVE: 2}
        return [record[: given.get(method_of(record), 4)] for record in self._backlog.queue.waiting()]

    def forget(self) -> None:
        """Empty the queue."""
        found: list[Record] = []
        self._backlog.queue.drain(found.extend, 10**9, (), 0)

    def learn(self, *agents: str) -> None:
        """Make *agents* known to the fast path."""
        for agent in agents:
            self.call("record_turn", "learning", agent)
        self.forget()


@pytest.fixture(params=[0, 1_000], ids=["slow", "fast"])
def tracker(request: pytest.FixtureRequest) -> Iterator[Idle]:
    """A tracker that takes every call the slow way, and one whose fast path is open."""
    found = Idle(gate=request.param)
    yield found
    found._backlog.abandon("closed")
    found.close(0)


# -- what is refused -------------------------------------------------------------------------------


class Lying(str):
    """A `str` whose own methods must never be asked."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("asked")

    __ne__ = __eq__

    def __hash__(self) -> int:
        raise RuntimeError("asked")

    def __len__(self) -> int:
        raise RuntimeError("asked")

    def __str__(self) -> str:
        raise RuntimeError("asked")

    __contains__ = __eq__
    encode = isascii = __eq__  # type: ignore[assignment]


class Broken:  # noqa: PLW1641 - __hash__ is there
    """Nothing about it works."""

    def _fail(self, *_: object) -> Any:
        raise RuntimeError("broken")

    __index__ = __int__ = __float__ = __hash__ = __repr__ = __str__ = __bool__ = __len__ = __lt__ = _fail
    __eq__ = _fail


class Unbound:
    """A proxy without a context, as web frameworks have them: even its class cannot be asked."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        raise RuntimeError("working outside of context")


class Impostor:
    """Equal to a known agent, with its hash, and no `str`."""

    def __hash__(self) -> int:
        return hash("billing")

    def __eq__(self, other: object) -> bool:
        return other == "billing"


class Index:
    """An integer as numpy has them: no `int`, and with `__index__`."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __index__(self) -> Any:
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


BAD_NAMES: dict[str, tuple[Any, str]] = {
    "NUL": ("a\0b", "NUL"),
    "only NUL": ("\0", "NUL"),
    "NUL not ASCII": ("é\0", "NUL"),
    "high surrogate": ("a\ud800", "surrogate"),
    "low surrogate": ("\udc80", "surrogate"),
    "surrogate pair apart": ("\ud83d\ude00", "surrogate"),
    "empty": ("", "empty"),
    "513 bytes": ("x" * 513, "at most 512 bytes in UTF-8, has 513"),
    "513 bytes in 512 characters": ("x" * 511 + "é", "has 513"),
    "514 bytes": ("é" * 257, "has 514"),
    "516 bytes": ("\U0001f600" * 129, "has 516"),
    "a million": ("x" * 10**6, "has 1000000"),
    "bytes": (b"thread", "must be a str"),
    "bytearray": (bytearray(b"t"), "must be a str"),
    "UUID": (UUID(int=1), "must be a str"),
    "int": (7, "must be a str"),
    "bool": (True, "must be a str"),
    "float": (1.5, "must be a str"),
    "tuple": (("t",), "must be a str"),
    "list": (["t"], "must be a str"),
    "object": (object(), "must be a str"),
    "type": (str, "must be a str"),
    "broken": (Broken(), "must be a str"),
    "unbound": (Unbound(), "must be a str"),
    "impostor": (Impostor(), "must be a str"),
    "mock": (Mock(spec=str), "must be a str"),
    "magic mock": (MagicMock(spec=str), "must be a str"),
    "lying NUL": (Lying("\0"), "NUL"),
    "lying empty": (Lying(""), "empty"),
    "lying long": (Lying("x" * 513), "has 513"),
}
BAD_TOKENS: dict[str, tuple[Any, str]] = {
    "bool": (True, "not a bool"),
    "False": (False, "not a bool"),
    "float": (1.0, "must be an integer"),
    "NaN": (float("nan"), "must be an integer"),
    "Decimal": (Decimal(1), "must be an integer"),
    "str": ("1", "must be an integer"),
    "None": (None, "must be an integer"),
    "complex": (1j, "must be an integer"),
    "list": ([1], "must be an integer"),
    "2**63": (2**63, "between -(2**63 - 1) and 2**63 - 1"),
    "-2**63": (-(2**63), "between"),
    "huge": (10**200_000, "between"),
    "index 2**63": (Index(2**63), "between"),
    "index float": (Index(1.5), "must be an integer"),
    "index raises": (Index(RuntimeError("no")), "__index__ that fails (RuntimeError)"),
    "broken": (Broken(), "__index__ that fails"),
    "unbound": (Unbound(), "must be an integer"),
    "mock": (Mock(spec=int), "must be an integer"),
}
BAD_COSTS: dict[str, tuple[Any, str]] = {
    "bool": (True, "not a bool"),
    "False": (False, "not a bool"),
    "NaN": (float("nan"), "finite"),
    "inf": (float("inf"), "finite"),
    "-inf": (float("-inf"), "finite"),
    "Decimal NaN": (Decimal("NaN"), "finite"),
    "Decimal -NaN123": (Decimal("-NaN123"), "finite"),
    "Decimal sNaN": (Decimal("sNaN"), "finite"),
    "Decimal Infinity": (Decimal("Infinity"), "finite"),
    "Decimal -Infinity": (Decimal("-Infinity"), "finite"),
    "Decimal 1E+2000": (Decimal("1E+2000"), "2000 digits before"),
    "Decimal -1E+2000": (Decimal("-1E+2000"), "2000 digits before"),
    "Decimal of 2001 digits": (Decimal("1" * 2_001), "2000 digits before"),
    "Decimal 1E+999999": (Decimal("1E+999999"), "2000 digits before"),
    "Decimal 1E-16384": (Decimal("1E-16384"), "16383 digits after"),
    "Decimal 1E-999999": (Decimal("1E-999999"), "16383 digits after"),
    "int of 2001 digits": (10**2_000, "2000 digits before"),
    "-int of 2001 digits": (-(10**2_000), "2000 digits before"),
    "int of 131072 digits": (10**131_071, "2000 digits before"),
    "Fraction": (Fraction(1, 2), "int, float or Decimal"),
    "complex": (1 + 0j, "int, float or Decimal"),
    "str": ("0.1", "int, float or Decimal"),
    "None": (None, "int, float or Decimal"),
    "index": (Index(1), "int, float or Decimal"),
    "broken": (Broken(), "int, float or Decimal"),
    "unbound": (Unbound(), "int, float or Decimal"),
    "mock int": (Mock(spec=int), "int, float or Decimal"),
    "mock float": (Mock(spec=float), "int, float or Decimal"),
    "mock Decimal": (Mock(spec=Decimal), "int, float or Decimal"),
}


def _cases() -> Iterator[Any]:
    places: list[tuple[str, str, dict[str, tuple[Any, str]], Callable[[Any], dict[str, Any]]]] = [
        ("ensure_conversation", "thread_id", BAD_NAMES, lambda value: {"thread_id": value}),
        ("record_turn", "thread_id", BAD_NAMES, lambda value: {"thread_id": value}),
        ("record_turn", "agent_name", BAD_NAMES, lambda value: {"thread_id": "t", "agent_name": value}),
        ("record_turn", "tokens", BAD_TOKENS, lambda value: {"thread_id": "t", "tokens": value}),
        ("record_turn", "cost", BAD_COSTS, lambda value: {"thread_id": "t", "cost": value}),
        ("resolve", "thread_id", BAD_NAMES, lambda value: {"thread_id": value, "resolution_type": "r"}),
        ("resolve", "resolution_type", BAD_NAMES, lambda value: {"thread_id": "t", "resolution_type": value}),
    ]
    for method, argument, values, arguments in places:
        for title, (value, words) in values.items():
            yield pytest.param(method, argument, arguments(value), words, id=f"{method}-{argument}-{title}")
        if values is BAD_NAMES and argument != "agent_name":
            yield pytest.param(method, argument, arguments(None), "must be a str", id=f"{method}-{argument}-None")


@pytest.mark.parametrize(("method", "argument", "arguments", "words"), list(_cases()))
def test_refused(tracker: Idle, method: str, argument: str, arguments: dict[str, Any], words: str) -> None:
    """A malformed argument is `InvalidCall` with its name and fault; nothing is enqueued, other calls stand."""
    tracker.learn("billing")
    tracker.call("ensure_conversation", "before")
    before = tracker.stats()
    with pytest.raises(InvalidCall) as found:
        tracker.call(method, **arguments)
    error = found.value
    assert error.argument == argument
    assert words in error.fault
    assert str(error).startswith(f"{argument} {error.fault}, got ")
    assert len(str(error)) < 250
    assert isinstance(error, ValueError)
    assert isinstance(error, TrackerError)
    after = tracker.stats()
    assert (after.accepted, after.pending, after.rejected) == (before.accepted, before.pending, before.rejected + 1)
    tracker.call("ensure_conversation", "after")
    assert tracker.queued == [("before",), ("after",)]


def test_a_refusal_can_be_copied() -> None:
    """`InvalidCall` survives `copy` and `pickle`, with its message."""
    with pytest.raises(InvalidCall) as found:
        calls.tokens(1.5)
    for twin in (copy.copy(found.value), pickle.loads(pickle.dumps(found.value))):  # noqa: S301 - our own
        assert (type(twin), str(twin)) == (InvalidCall, "tokens must be an integer, got 1.5")


class Nameless(type):
    """A metaclass whose classes have no name."""

    @property  # type: ignore[misc]
    def __name__(cls) -> str:
        raise RuntimeError("asked")


class Hostile(metaclass=Nameless):
    """Its `__repr__` raises what it was made with, or returns it."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __repr__(self) -> Any:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


class Endless(str):
    """A text that fails when it is looked at."""

    __slots__ = ()

    def __len__(self) -> int:
        raise SystemExit

    def __getitem__(self, key: object) -> str:
        raise SystemExit

    def __format__(self, spec: str) -> str:
        raise SystemExit


@pytest.mark.parametrize(
    "answer", [SystemExit(1), GeneratorExit(), BaseException(), RecursionError(), MemoryError(), 7, None], ids=repr
)
def test_a_message_survives_any_repr(answer: Any) -> None:
    """A refused value that raises when shown, even by `sys.exit`, hides no message and does not end the host."""
    with pytest.raises(InvalidCall) as found:
        calls.tokens(Hostile(answer))
    assert str(found.value) == "tokens must be an integer, got <Hostile whose repr fails>"


def test_a_message_survives_a_repr_of_another_kind() -> None:
    """A `repr` of a subclass of `str` is shown by its characters; its own methods never run."""
    assert shown(Hostile(Endless("x" * 100))) == "x" * 79 + "…"
    assert shown(Hostile(Endless("short"))) == "short"


def test_ctrl_c_while_a_message_is_made() -> None:
    """A Ctrl-C that comes while a value is shown is the user's, and passes."""
    with pytest.raises(KeyboardInterrupt):
        shown(Hostile(KeyboardInterrupt()))


# -- what is accepted ------------------------------------------------------------------------------


class Text(str):
    """A harmless subclass."""

    __slots__ = ()


class Color(enum.StrEnum):
    """Members are `str`."""

    RED = "red"


class Whole(int):
    """A subclass that would answer otherwise."""

    def __index__(self) -> int:
        raise RuntimeError("asked")

    __int__ = __float__ = bit_length = __index__

    def __lt__(self, other: object) -> bool:
        raise RuntimeError("asked")

    __gt__ = __le__ = __ge__ = __lt__


class Real(float):
    """A subclass that would answer otherwise."""

    def __float__(self) -> float:
        raise RuntimeError("asked")

    def __repr__(self) -> str:
        return "nan"

    def __sub__(self, other: object) -> float:
        return 1.0


class Money(Decimal):
    """A subclass that would answer otherwise."""

    def __bool__(self) -> bool:
        raise RuntimeError("asked")

    is_finite = adjusted = as_tuple = __bool__  # type: ignore[assignment]


GOOD_NAMES = ["x", "x" * 512, "é" * 256, "\U0001f600" * 128, "\x01", " ", "\n", *AWKWARD, *LONG]


@pytest.mark.parametrize("name", GOOD_NAMES, ids=ascii)
def test_names(tracker: Idle, name: str) -> None:
    """Names of 1 to 512 bytes with any other character are taken as they are, by each call."""
    tracker.learn(name)
    for value in (name, Text(name), Lying(name)):
        assert tracker.call("ensure_conversation", value)
        assert tracker.call("record_turn", value, value)
        assert tracker.call("resolve", value, value)
    assert tracker.queued == [(name,), (name, name, 0, 0), (name, name)] * 3
    for record in tracker.queued:
        assert all(type(part) in {str, int} for part in record)


def test_enumerations(tracker: Idle) -> None:
    """A member of a `StrEnum` is its value."""
    tracker.call("record_turn", Color.RED, Color.RED)
    assert tracker.queued == [("red", "red", 0, 0)]
    assert type(tracker.queued[0][0]) is type(tracker.queued[0][1]) is str


@pytest.mark.parametrize(
    "tokens",
    [0, 1, -1, 2**30, 10**9 - 1, 10**9, 2**63 - 1, -(2**63) + 1],
)
def test_tokens(tracker: Idle, tokens: int) -> None:
    """Integers of ±(2**63 - 1) are taken, of any type that has `__index__`, and become plain."""
    for value in (tokens, Index(tokens), Whole(tokens)):
        assert tracker.call("record_turn", "t", None, value)
    assert tracker.queued == [("t", None, tokens, 0)] * 3
    assert all(type(record[2]) is int for record in tracker.queued)


GOOD_COSTS = [
    0, 1, -1, 2**63, -(10**400), 10**2_000 - 1, -(10**2_000) + 1, 0.0, -0.0, 0.1, -0.1, 1e-300, 5e-324, 1.7976931348623157e308, 1e9,
    Decimal(0), Decimal("-0"), Decimal("0.10"), Decimal("1E-16383"), Decimal("1e1000"), Decimal("-9.9E+1999"), Decimal("9" * 2_000),
]  # fmt: skip


@pytest.mark.parametrize("cost", GOOD_COSTS, ids=lambda value: type(value).__name__)
def test_costs(tracker: Idle, cost: Any) -> None:
    """Finite numbers of up to 2,000 digits before the point are taken and become plain; what counts is what `repr` prints."""
    subclass = {int: Whole, float: Real, Decimal: Money}[type(cost)]
    for value in (cost, subclass(cost)):
        assert tracker.call("record_turn", "t", None, 0, value)
    assert tracker.queued == [("t", None, 0, cost)] * 2
    assert all(type(record[3]) is type(cost) for record in tracker.queued)
    assert calls.decimal(cost) == (Decimal(repr(cost)) if isinstance(cost, float) else cost)


def test_defaults_and_keywords(tracker: Idle) -> None:
    """`record_turn` needs a thread only; all arguments have the contract's names, in its order."""
    tracker.learn("a")
    assert tracker.call("record_turn", "t") is True
    tracker.call("record_turn", "t", "a", 1, 0.5)
    tracker.call("record_turn", cost=0.5, tokens=1, agent_name="a", thread_id="t")
    tracker.call("ensure_conversation", thread_id="t")
    tracker.call("resolve", resolution_type="r", thread_id="t")
    turn = ("t", "a", 1, 0.5)
    assert tracker.queued == [("t", None, 0, 0), turn, turn, ("t",), ("t", "r")]


def test_missing_arguments(tracker: Idle) -> None:
    """A call with too few or unknown arguments is Python's own `TypeError`."""
    for call in (
        partial(tracker.call, "ensure_conversation"),
        partial(tracker.call, "record_turn"),
        partial(tracker.call, "resolve", "t"),
        partial(tracker.call, "record_turn", "t", turns=1),
    ):
        with pytest.raises(TypeError, match="argument"):
            call()
    assert tracker.queued == []


# -- the two ways in -------------------------------------------------------------------------------

anything = st.one_of(
    names(),
    # Around the bound on length, with NUL anywhere.
    st.tuples(st.sampled_from([0, 1, 510, 511, 512, 513]), st.sampled_from(["", "\0", "\x01", "é", "\x7f"])).flatmap(
        lambda parts: st.integers(0, parts[0]).map(lambda at: "x" * at + parts[1] + "x" * (parts[0] - at))
    ),
    st.text(max_size=3),
    st.text(st.characters(categories=["Cs", "Ll"]) | st.just("\0"), max_size=4),
    st.none(),
    st.booleans(),
    st.integers(-(2**64), 2**64),
    st.floats(),
    st.decimals(),
    any_costs(),
    st.binary(max_size=3),
    # Made anew each time: these can neither be hashed nor compared.
    st.sampled_from([str, Text, Lying]).map(lambda kind: kind("billing")),
    st.sampled_from([Impostor, Broken, Mock]).map(lambda kind: kind()),
    st.sampled_from([Whole, Index, Real, Money]).map(lambda kind: kind(5)),
)


def outcome(tracker: Idle, method: str, arguments: tuple[Any, ...]) -> Any:
    """Return what becomes of a call: what was queued, or the argument and fault."""
    tracker.forget()
    try:
        tracker.call(method, *arguments)
    except InvalidCall as error:
        assert tracker.queued == []
        return error.argument, error.fault
    (record,) = tracker.queued
    return [(type(part), repr(part)) for part in record]


@settings(deadline=None, database=None, max_examples=400, suppress_health_check=list(HealthCheck))
@given(
    method=st.sampled_from(["ensure_conversation", "record_turn", "resolve"]),
    arguments=st.tuples(anything, anything, anything, anything),
)
@example(method="record_turn", arguments=("t", Impostor(), 0, 0))
@example(method="record_turn", arguments=("t", Lying("billing"), 0, 0))
@example(method="record_turn", arguments=("t", "billing", True, 0.5))
@example(method="record_turn", arguments=("t", "billing", 1, True))
def test_fast_and_slow_agree(method: str, arguments: tuple[Any, ...]) -> None:
    """A call is accepted, or refused for the same reason, whether the fast path is open, shut, or knows the agent."""
    given_arguments = arguments[: {"ensure_conversation": 1, "record_turn": 4, "resolve": 2}[method]]
    slow, fast, knowing = PAIR
    first = outcome(slow, method, given_arguments)
    assert outcome(fast, method, given_arguments) == first
    assert outcome(knowing, method, given_arguments) == first
    # The agent of the second try is known by now.
    assert outcome(fast, method, given_arguments) == first


PAIR = (Idle(), Idle(gate=10**6), Idle(gate=10**6))
PAIR[2].learn("billing", *AWKWARD)


def test_agents_known_to_the_fast_path_are_bounded() -> None:
    """A host that makes up agent names does not grow the process: later ones go the slow way, and count."""
    tracker = Idle(gate=10**6)
    for number in range(3_000):
        assert tracker.call("record_turn", "t", f"agent{number}")
    assert len(tracker._agents) <= 1_025
    assert len({record[1] for record in tracker.queued}) == 3_000


# -- full and closed -------------------------------------------------------------------------------

CALLS: list[tuple[str, tuple[Any, ...]]] = [
    ("ensure_conversation", ("new",)),
    ("record_turn", ("new", "a", 1, 1)),
    ("resolve", ("new", "r")),
]


@pytest.mark.parametrize(("method", "arguments"), CALLS, ids=str)
def test_full(method: str, arguments: tuple[Any, ...]) -> None:
    """At a bound every kind of call is refused and counted; `overflow="raise"` names the bound and its limit."""
    for options, bound in (({"max_queue_size": 3}, "max_queue_size"), ({"max_pending": 3}, "max_pending")):
        dropping, raising = Idle(**options), Idle(**options, overflow="raise")
        for tracker in (dropping, raising):
            for number in range(3):
                assert tracker.call("ensure_conversation", f"t{number}")
        assert dropping.call(method, *arguments) is False
        with pytest.raises(QueueFull, match=f"{bound}=3 is reached") as found:
            raising.call(method, *arguments)
        assert (found.value.bound, found.value.limit) == (bound, 3)
        for tracker in (dropping, raising):
            stats = tracker.stats()
            assert (stats.accepted, stats.pending, stats.rejected) == (3, 3, 1)
            assert +Counter(tracker.reading().rejected) == {"full": 1}
            with pytest.raises(InvalidCall):  # what is wrong comes first
                tracker.call("ensure_conversation", "")


@pytest.mark.parametrize(("method", "arguments"), CALLS, ids=str)
def test_closed(method: str, arguments: tuple[Any, ...]) -> None:
    """After `close` every kind of call is refused and counted, or raises `TrackerClosed`."""
    dropping, raising = Idle(), Idle(overflow="raise")
    for tracker in (dropping, raising):
        tracker.close()
    assert getattr(dropping, method)(*arguments) is False
    with pytest.raises(TrackerClosed, match="make a new Tracker"):
        getattr(raising, method)(*arguments)
    for tracker in (dropping, raising):
        assert +Counter(tracker.reading().rejected) == {"closed": 1}
        assert tracker.stats().accepted == 0


def test_an_argument_that_there_is_none_of(tracker: Idle) -> None:
    """A missing or misspelt argument is Python's own TypeError, and names the public class."""
    for call, words in (
        (partial(tracker.record_turn, "t", token=1), "record_turn() got an unexpected keyword argument 'token'"),
        (tracker.ensure_conversation, "ensure_conversation() missing 1 required positional argument"),
        (partial(tracker.resolve, "t"), "resolve() missing 1 required positional argument"),
    ):
        with pytest.raises(TypeError) as raised:
            call()
        assert str(raised.value).startswith(f"Tracker.{words}")


def test_stats_tell_rows_that_were_skipped(registry: CollectorRegistry) -> None:
    """With `create_missing=False` a turn without a conversation counts as applied, and its row as skipped."""
    with Tracker(MemorySink(), create_missing=False, registry=registry) as tracker:
        tracker.record_turn("none", "agent", 1)
        tracker.record_turn("none", "agent", 1)
        tracker.ensure_conversation("one")
        tracker.flush(60)
        stats = tracker.stats()
    assert (stats.accepted, stats.applied, stats.rows_skipped) == (3, 3, 1)
