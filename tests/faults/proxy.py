"""A proxy in front of Postgres that reads message frames and fails the Nth one.

The loop it is made for; arming counts from zero again, so it ends once N is past the last message:

    for n in itertools.count(1):
        proxy.arm(Cut("server", n))
        work(proxy.conninfo)
        if not proxy.fired:
            break

Rules:
1. A fault counts messages from `arm` on, over all connections; only those count that it asks for (`kind`,
   `contains`). It fires at the Nth, `repeat` times in all, and then everything passes again.
2. When two faults are due at one message, the first armed takes it; the other takes its next match.
3. What was sent before `arm` or before reading `fired` is judged before they return: both wait until every byte
   that the kernel already holds has been read, so a client's farewell never counts for the next run.
4. Nothing is encrypted: SSLRequest and GSSENCRequest are answered "N" here and never reach the server.
5. Memory is bounded: a message is streamed, and `contains` looks at its first 64 KiB.
6. The proxy needs the interpreter's lock, so a client in the same process must not wait inside libpq while it
   holds it: psycopg does so in `Connection.cancel` (use `cancel_safe`), `PGconn.connect` and a bare `get_result`.

Its sockets live in a thread with an event loop of its own, so a test may use any loop or none. `fired`, `arm`,
`settle` and `wait_fired` block the caller: they need no answer from the test's loop, yet hold it up.
Source: PostgreSQL manual, "Frontend/Backend Protocol".
"""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
import threading
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, Self, TypeVar

from psycopg.conninfo import conninfo_to_dict, make_conninfo

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping
    from types import TracebackType

T = TypeVar("T")
Direction = Literal["client", "server"]
DIRECTIONS: Final[tuple[Direction, Direction]] = ("client", "server")

CHUNK_BYTES: Final = 256 * 1024
PEEK_BYTES: Final = 64 * 1024
POLL_S: Final = 0.001
PATIENCE_S: Final = 30.0
MAX_CONNECTIONS: Final = 1000
MAX_STARTUP_BYTES: Final = 10_000
UNTYPED: Final = {80877102: "cancel", 80877103: "ssl", 80877104: "gss"}
FLUSH: Final = b"H\x00\x00\x00\x04"
HEADER: Final = struct.Struct("!cI")
STARTUP_HEADER: Final = struct.Struct("!II")


class Flag(Protocol):
    """What lets a held message go: an Event of threading, asyncio, anyio or trio."""

    def is_set(self) -> bool:
        """Whether to let go."""
        ...


@dataclass(frozen=True)
class MessageFault:
    """Fires at the *n*-th message that asks for it, counted from arming; see the subclasses.

    direction: "client" for what the client sends, "server" for what the server sends.
    kind: the message's type byte, or "startup", "cancel", "ssl", "gss"; None for any.
    contains: bytes to be found in the first 64 KiB of the message; None for any.
    repeat: how many times in all: at matches n, n + 1, …; None for no limit.
    """

    direction: Direction
    n: int = 1
    kind: str | None = field(default=None, kw_only=True)
    contains: bytes | None = field(default=None, kw_only=True)
    repeat: int | None = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction {self.direction!r}: one of {DIRECTIONS}")
        check_counts(self.n, self.repeat)

    def wants(self, direction: Direction, kind: str, buffer: bytearray, at: int, size: int) -> bool:
        """Whether the message at *at* is of those that count."""
        return (
            direction == self.direction
            and self.kind in (None, kind)
            and (self.contains is None or buffer.find(self.contains, at, at + min(size, PEEK_BYTES)) >= 0)
        )


@dataclass(frozen=True)
class Cut(MessageFault):
    """Close both sides right before the message, or with its first *after* bytes forwarded.

    The cut always falls inside the message: *after* is at most its size less one; negative counts from the end.
    """

    after: int = field(default=0, kw_only=True)


@dataclass(frozen=True)
class CutAfter(MessageFault):
    """Let the server do the work, lose its answer, and close both sides.

    "client": the message is forwarded and nothing after it. "server": the message is dropped. Either way the server
    is then read, and nothing forwarded, until it has answered all that it was sent, or *wait_s* has passed;
    `Fired.processed` says which. A bare CopyData or Flush has no answer of its own.
    """

    wait_s: float = field(default=5.0, kw_only=True)


@dataclass(frozen=True)
class Delay(MessageFault):
    """Hold the message and those behind it for *seconds*, until *until* is set, or until `release()`.

    A held client message outlives its client: it is forwarded even when the client has gone meanwhile.
    """

    seconds: float | None = field(default=None, kw_only=True)
    until: Flag | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class Blackhole(MessageFault):
    """From the message on, this connection stays open and deaf both ways, for as long as a Delay would.

    Neither side sees the other hang up; what was kept, hang-ups too, goes on after the release.
    """

    seconds: float | None = field(default=None, kw_only=True)
    until: Flag | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class Refuse:
    """Close the *n*-th new connection at once; *silent*: accept it and stay silent for as long as a Delay would."""

    n: int = 1
    silent: bool = False
    seconds: float | None = field(default=None, kw_only=True)
    until: Flag | None = field(default=None, kw_only=True)
    repeat: int | None = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        check_counts(self.n, self.repeat)


Fault = MessageFault | Refuse


def check_counts(n: int, repeat: int | None) -> None:
    """Refuse what could never fire."""
    if n < 1 or (repeat is not None and repeat < 1):
        raise ValueError(f"n={n}, repeat={repeat}: both count from 1")


@dataclass(frozen=True)
class Fired:
    """One firing: which fault, on which connection (from 1), at which message.

    index: the message's number in its direction, any kind, since arming; 0 for Refuse.
    size: bytes of the message with its header; 0 for Refuse.
    processed: of CutAfter, whether the server was seen to have answered all that it was sent.
    """

    fault: Fault
    connection: int
    kind: str
    index: int
    size: int
    processed: bool = False


@dataclass
class Armed:
    """An armed fault, how often it has matched, and how often it may still fire (None: no limit)."""

    fault: Fault
    left: int | None
    seen: int = 0

    def due(self) -> bool:
        """Count one match and say whether it is this fault's turn."""
        self.seen += 1
        return self.seen >= self.fault.n and self.left != 0

    def fire(self) -> Fault:
        """Use up one firing."""
        if self.left is not None:
            self.left -= 1
        return self.fault


class Frames:
    """The bytes of one direction of one connection, and where its messages begin."""

    def __init__(self, *, startup: bool) -> None:
        self.buffer = bytearray()
        self.rest = 0  # bytes still to come of a message that passes
        self.judged = False  # the message in front has been counted, and held, before
        self.startup = startup
        self.declined = 0  # encryption requests to answer

    def message_at(self, at: int) -> tuple[str, int] | None:
        """Kind and whole size of the message at *at*; None until enough of it is there to judge it."""
        there = len(self.buffer) - at
        if self.startup:
            if there < STARTUP_HEADER.size:
                return None
            size, code = STARTUP_HEADER.unpack_from(self.buffer, at)
            if not STARTUP_HEADER.size <= size <= MAX_STARTUP_BYTES:
                raise ValueError(f"not a Postgres client: it starts with {bytes(self.buffer[at : at + 8])!r}")
            return (UNTYPED.get(code, "startup"), size) if there >= size else None
        if there < HEADER.size:
            return None
        kind, length = HEADER.unpack_from(self.buffer, at)
        if length < 4:
            raise ValueError(f"message {kind!r} says that its length is {length}")
        size = length + 1
        return (kind.decode("latin-1"), size) if there >= min(size, PEEK_BYTES) else None


class Owed:
    """What the server still owes a client: one answer a request.

    With several Syncs in flight and an error among them it may owe less than this says, until the last
    ReadyForQuery clears all.
    """

    REQUESTS: Final = {
        **dict.fromkeys("QFS", "Z"),
        **dict.fromkeys("Ecf", "C"),
        **dict(zip("PBCD", "123T", strict=True)),
        **dict.fromkeys(("p", "startup"), "R"),
        **dict.fromkeys(("X", "cancel"), "eof"),
    }
    ANSWERS: Final = {**{c: c for c in "123TCRZEG"}, "n": "T", **dict.fromkeys("IsHW", "C")}
    NEED_FLUSH: Final = frozenset("PBCDEcf")

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.last = ""
        self.copying_in = False

    def note(self, direction: Direction, kind: str) -> None:
        """Take one message into account."""
        if direction == "client":
            if kind in self.REQUESTS:
                self.count[self.REQUESTS[kind]] += 1
                self.last = kind
                self.copying_in = False
        elif kind in self.ANSWERS:
            self.answered(self.ANSWERS[kind])

    def answered(self, answer: str) -> None:
        """Strike off what one message of the server answers."""
        if answer == "G":
            # The server ignores a Sync that came before the COPY data: no ReadyForQuery will answer it.
            if self.last == "S":
                self.count["Z"] -= 1
            self.count["C"] -= 1
            self.copying_in = True
        elif answer != "E":
            self.count[answer] -= 1
        self.count = +self.count
        if answer in "ZE" and not self.count["Z"]:
            self.count = Counter(eof=self.count["eof"])

    def settled(self) -> bool:
        """Whether nothing more will come unasked."""
        return self.copying_in or not self.count.total()


class Link:
    """One client connection with its own connection to the server."""

    def __init__(self, number: int, client: socket.socket) -> None:
        self.number = number
        self.sockets: dict[Direction, socket.socket] = {"client": client}
        self.frames = {d: Frames(startup=d == "client") for d in DIRECTIONS}
        self.owed = Owed()
        self.open = asyncio.Event()  # cleared: a black hole
        self.open.set()
        self.swallowing = False
        self.settled = asyncio.Event()
        self.over = asyncio.Event()
        self.tasks: list[asyncio.Task[None]] = []
        self.cuts: list[Fired] = []

    async def end(self) -> None:
        """Stop all that runs for this connection, then close both sockets."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for sock in self.sockets.values():
            sock.close()


class FaultProxy:
    """The proxy: ``with FaultProxy(pg.conninfo, socket_dir=tmp_path) as proxy: connect(proxy.conninfo)``.

    upstream: conninfo of the server; its host may be a socket directory.
    socket_dir: where to listen, on a Unix socket; None: on a free port of 127.0.0.1.
    Leaving the context closes every connection, and raises when the proxy itself met what it does not understand.
    """

    def __init__(self, upstream: str, *, socket_dir: Path | str | None = None) -> None:
        self.socket_dir = None if socket_dir is None else Path(socket_dir)
        self.redirect(upstream)
        self._changed = threading.Condition()  # guards all that follows; notified on each firing
        self._armed: list[Armed] = []
        self._fired: deque[Fired] = deque(maxlen=10_000)
        self._pending = 0
        self._counts: Counter[tuple[Direction, str]] = Counter()
        self._totals: Counter[Direction] = Counter()
        self._log: deque[list[Any]] = deque(maxlen=200)
        self._errors: list[Exception] = []
        self._accepted = 0
        self._links: dict[Link, asyncio.Task[None]] = {}
        self._gates: set[asyncio.Event] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    def redirect(self, upstream: str) -> None:
        """Send connections made from now on to another server; `conninfo` follows its user and database."""
        self._upstream = conninfo_to_dict(upstream)
        self._target = address_of(self._upstream)

    @property
    def conninfo(self) -> str:
        """Connects through the proxy; otherwise as *upstream*, without encryption."""
        params = {k: v for k, v in self._upstream.items() if k != "hostaddr"}
        params |= {"host": self._host, "port": self._port, "sslmode": "disable", "gssencmode": "disable"}
        return make_conninfo("", **params)

    def arm(self, *faults: Fault) -> None:
        """Replace what is armed; `fired`, `messages` and every fault's count begin at zero. No fault: only count."""
        self.settle()
        with self._changed:
            self._armed = [Armed(fault, fault.repeat) for fault in faults]
            self._fired.clear()
            self._counts.clear()
            self._totals.clear()

    def disarm(self) -> None:
        """Let everything pass from now on; what is held stays held, and `fired` stays."""
        with self._changed:
            self._armed = []

    def release(self) -> None:
        """Let go all that Delay, Blackhole and a silent Refuse hold at this moment."""
        self._call(self._release())

    def sever_all(self) -> int:
        """Close every connection, both sides, at once; the number closed."""
        return self._call(self._sever())

    def settle(self) -> None:
        """Wait until all that was sent before this call has been judged, and every cut under way is done."""
        if self._loop is None:
            return
        self._call(self._passes())
        with self._changed:
            if not self._changed.wait_for(lambda: not self._pending, PATIENCE_S):
                raise TimeoutError(f"a cut is not done after {PATIENCE_S} s; {self.log}")

    @property
    def fired(self) -> list[Fired]:
        """What fired since `arm`, in order (the last 10,000)."""
        self.settle()
        with self._changed:
            return list(self._fired)

    def wait_fired(self, timeout: float = 10.0, *, count: int = 1) -> Fired:
        """Wait until *count* faults have fired since `arm` and return that one.

        Raises:
            TimeoutError: fewer have; the message holds the log.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._fired) >= count, timeout):
                raise TimeoutError(f"{len(self._fired)} of {count} faults fired in {timeout} s; {self.log}")
            return self._fired[count - 1]

    def messages(self, direction: Direction, kind: str | None = None) -> int:
        """How many messages, of that kind or any, have come that way since `arm`."""
        self.settle()
        with self._changed:
            return sum(c for (d, k), c in self._counts.items() if d == direction and kind in (None, k))

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return len(self._links)

    @property
    def log(self) -> list[str]:
        """The last 200 runs of messages, for assertion messages: "connection side kind xcount"."""
        with self._changed:
            return [f"{number} {direction} {kind} x{count}" for number, direction, kind, count in self._log]

    def __enter__(self) -> Self:
        self._listener = self._listen()
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), name="fault-proxy", daemon=True)
        self._thread.start()
        if not started.wait(PATIENCE_S):
            raise TimeoutError("the proxy's thread does not start")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(PATIENCE_S)
        if self._thread.is_alive():
            raise TimeoutError("the proxy's thread does not end")
        if self._errors and error is None:
            raise ExceptionGroup(f"the proxy failed; {self.log}", self._errors)

    # What follows runs in the proxy's thread, `_listen` and `_call` excepted.

    def _run(self, started: threading.Event) -> None:
        with asyncio.Runner(debug=False, loop_factory=asyncio.SelectorEventLoop) as runner:
            runner.run(self._main(started))

    async def _main(self, started: threading.Event) -> None:
        self._stop = asyncio.Event()
        self._loop = loop = asyncio.get_running_loop()
        loop.add_reader(self._listener, self._accept)
        started.set()
        await self._stop.wait()
        loop.remove_reader(self._listener)
        self._listener.close()
        if self.socket_dir is not None:
            socket_path(self.socket_dir, self._port).unlink(missing_ok=True)
        await self._sever()
        self._loop = None

    def _listen(self) -> socket.socket:
        if self.socket_dir is None:
            listener = socket.create_server(("127.0.0.1", 0), backlog=128)
            self._host, self._port = "127.0.0.1", int(listener.getsockname()[1])
            listener.setblocking(False)
            return listener
        self._host = str(self.socket_dir.absolute())
        for self._port in range(5432, 5532):
            listener = socket.socket(socket.AF_UNIX)
            try:
                listener.bind(str(socket_path(self.socket_dir, self._port)))
            except OSError as error:
                listener.close()
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                listener.listen(128)
                listener.setblocking(False)
                return listener
        raise OSError(errno.EADDRINUSE, f"100 sockets in {self.socket_dir} are taken")

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:
            return  # the client is gone already
        if len(self._links) >= MAX_CONNECTIONS:
            client.close()
            return
        client.setblocking(False)
        no_delay(client)
        self._accepted += 1
        link = Link(self._accepted, client)
        self._links[link] = asyncio.create_task(self._serve(link))

    async def _serve(self, link: Link) -> None:
        link.tasks.append(asyncio.create_task(self._guard(link, self._begin(link))))
        await link.over.wait()
        await link.end()
        with self._changed:
            del self._links[link]
            processed = link.settled.is_set()
            self._fired.extend(replace(cut, processed=processed) for cut in link.cuts)
            self._pending -= len(link.cuts)
            self._changed.notify_all()

    async def _begin(self, link: Link) -> None:
        refusal = self._judge_connection(link)
        if refusal is not None:
            if not refusal.silent:
                return
            await self._hold(refusal)
        link.sockets["server"] = await dial(self._target)
        link.tasks.append(asyncio.create_task(self._guard(link, self._pump(link, "server"))))
        await self._pump(link, "client")

    async def _guard(self, link: Link, work: Coroutine[None, None, None]) -> None:
        """Run one task of a connection: its end, for any reason, is the end of the connection."""
        try:
            await work
        except OSError:
            pass  # a peer hung up, or no server is there
        except Exception as error:  # a bug here must fail the test and not look like a fault
            self._errors.append(error)
        finally:
            link.over.set()

    async def _pump(self, link: Link, direction: Direction) -> None:
        loop = asyncio.get_running_loop()
        source, target = link.sockets[direction], link.sockets[other(direction)]
        frames = link.frames[direction]
        while True:
            chunk = await loop.sock_recv(source, CHUNK_BYTES)
            frames.buffer += chunk
            busy = True
            while busy:
                await link.open.wait()
                if link.swallowing and direction == "client":
                    await asyncio.Event().wait()  # until the cut
                passed, hit = self._scan(link, direction)
                if frames.declined:
                    await loop.sock_sendall(source, b"N" * frames.declined)
                    frames.declined = 0
                if link.swallowing:
                    if link.owed.settled():
                        link.settled.set()
                elif passed:
                    await loop.sock_sendall(target, passed)
                busy = hit is not None
                if hit is not None and not await self._act(link, direction, hit):
                    return
            if not chunk:
                await self._hang_up(link, direction, target)
                return
            await asyncio.sleep(0)

    async def _hang_up(self, link: Link, direction: Direction, target: socket.socket) -> None:
        """One side has hung up: what it sent of a last, unfinished message still goes over."""
        if link.swallowing:
            link.owed.count["eof"] = 0
            if link.owed.settled():
                link.settled.set()
        elif link.frames[direction].buffer:
            await asyncio.get_running_loop().sock_sendall(target, bytes(link.frames[direction].buffer))

    async def _act(self, link: Link, direction: Direction, hit: Fired) -> bool:
        """Do what the fault says; whether the connection lives on."""
        fault = hit.fault
        if isinstance(fault, Cut):
            size = hit.size
            kept = max(0, size + fault.after) if fault.after < 0 else min(fault.after, size - 1)
            await self._forward(link, direction, kept)
            return False
        if isinstance(fault, CutAfter):
            link.swallowing = True
            if direction == "client":
                await self._forward(link, direction, hit.size)
                if hit.kind in Owed.NEED_FLUSH:
                    await asyncio.get_running_loop().sock_sendall(link.sockets["server"], FLUSH)
                if hit.kind in {"d", "H"}:
                    return False
            link.tasks.append(asyncio.create_task(self._guard(link, self._await_answer(link, fault.wait_s))))
        elif isinstance(fault, Blackhole):
            link.open.clear()
            await self._hold(fault)
            link.open.set()
        elif isinstance(fault, Delay):
            await self._hold(fault)
        return True

    async def _await_answer(self, link: Link, wait_s: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await link.settled.wait()

    async def _forward(self, link: Link, direction: Direction, count: int) -> None:
        """Forward exactly *count* bytes of the message in front, which may not all be here yet."""
        loop = asyncio.get_running_loop()
        buffer = link.frames[direction].buffer
        while count:
            if not buffer:
                chunk = await loop.sock_recv(link.sockets[direction], CHUNK_BYTES)
                if not chunk:
                    return
                buffer += chunk
            part = bytes(buffer[:count])
            del buffer[: len(part)]
            await loop.sock_sendall(link.sockets[other(direction)], part)
            count -= len(part)

    async def _hold(self, fault: Delay | Blackhole | Refuse) -> None:
        gate = asyncio.Event()
        self._gates.add(gate)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(fault.seconds):
                    if fault.until is None:
                        await gate.wait()
                    # The flag may belong to any event loop, or to none: it can only be looked at.
                    while not (gate.is_set() or (fault.until is not None and fault.until.is_set())):  # noqa: ASYNC110
                        await asyncio.sleep(POLL_S)
        finally:
            self._gates.discard(gate)

    async def _release(self) -> None:
        for gate in self._gates:
            gate.set()

    async def _sever(self) -> int:
        tasks = list(self._links.values())
        for link in self._links:
            link.over.set()
        await asyncio.gather(*tasks)
        return len(tasks)

    async def _passes(self) -> None:
        # One pass of the loop receives what is there, the next wakes the pump that judges it; the rest is margin
        # for a connection that is only now accepted.
        for _ in range(6):
            await asyncio.sleep(0)

    def _call(self, work: Coroutine[None, None, T]) -> T:
        """Run *work* in the proxy's thread, from any other."""
        if self._loop is None:
            work.close()
            raise RuntimeError("the proxy is not running")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_S)

    def _scan(self, link: Link, direction: Direction) -> tuple[bytes, Fired | None]:
        """Take from the buffer the messages that pass; stop before one at which a fault fires."""
        frames = link.frames[direction]
        buffer = frames.buffer
        hit = None
        with self._changed:
            at = min(frames.rest, len(buffer))
            frames.rest -= at
            while (message := frames.message_at(at)) is not None:
                kind, size = message
                if not frames.judged:
                    hit = self._judge(link, direction, kind, at, size)
                    if hit is not None:
                        frames.judged = True
                        break
                frames.judged = False
                if frames.startup:
                    frames.startup = kind in {"ssl", "gss"}
                    if frames.startup:
                        del buffer[at : at + size]
                        frames.declined += 1
                        continue
                end = at + size
                at = min(end, len(buffer))
                frames.rest = end - at
        passed = bytes(buffer[:at])
        del buffer[:at]
        return passed, hit

    def _judge(self, link: Link, direction: Direction, kind: str, at: int, size: int) -> Fired | None:
        """Count one message and let each armed fault count it; the one that fires, if any."""
        self._counts[direction, kind] += 1
        self._totals[direction] += 1
        if self._log and self._log[-1][:3] == [link.number, direction, kind]:
            self._log[-1][3] += 1
        else:
            self._log.append([link.number, direction, kind, 1])
        link.owed.note(direction, kind)
        if link.swallowing:
            return None
        taker: Armed | None = None
        buffer = link.frames[direction].buffer
        for armed in self._armed:
            fault = armed.fault
            if isinstance(fault, MessageFault) and fault.wants(direction, kind, buffer, at, size) and armed.due():
                taker = taker or armed
        if taker is None:
            return None
        fired = Fired(taker.fire(), link.number, kind, self._totals[direction], size)
        if isinstance(fired.fault, Cut | CutAfter):
            link.cuts.append(fired)
            self._pending += 1
        else:
            self._fired.append(fired)
            self._changed.notify_all()
        return fired

    def _judge_connection(self, link: Link) -> Refuse | None:
        """Let each armed Refuse count one connection; the one that fires, if any."""
        with self._changed:
            due = [armed for armed in self._armed if isinstance(armed.fault, Refuse) and armed.due()]
            if not due:
                return None
            fault = due[0].fire()
            self._fired.append(Fired(fault, link.number, "connection", 0, 0))
            self._changed.notify_all()
            return fault if isinstance(fault, Refuse) else None


def other(direction: Direction) -> Direction:
    """The side that receives what *direction* sends."""
    return "server" if direction == "client" else "client"


def socket_path(folder: Path, port: int) -> Path:
    """Where a client of libpq looks for the socket of *port* in *folder*."""
    return folder / f".s.PGSQL.{port}"


def address_of(params: Mapping[str, str | int | None]) -> tuple[int, str | tuple[str, int]]:
    """Address family and address of the one server that *params* name.

    Raises:
        ValueError: no host, or several.
    """
    host = str(params.get("hostaddr") or params.get("host") or "")
    port = int(params.get("port") or 5432)
    if not host or "," in host:
        raise ValueError(f"host {host!r}: the proxy needs exactly one")
    if host.startswith("/"):
        return socket.AF_UNIX, str(socket_path(Path(host), port))
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return family, (str(address[0]), port)


async def dial(target: tuple[int, str | tuple[str, int]]) -> socket.socket:
    """Connect to the server."""
    family, address = target
    sock = socket.socket(family)
    try:
        sock.setblocking(False)
        no_delay(sock)
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.get_running_loop().sock_connect(sock, address)
    except BaseException:
        sock.close()
        raise
    return sock


def no_delay(sock: socket.socket) -> None:
    """Send small messages at once."""
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
