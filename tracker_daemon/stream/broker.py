"""The connection to the servers: all there is of NATS in this package, with `driver`.

Rules:
1. Everything happens in the loop that runs it; only `abort` may come from another thread.
2. Every exchange has a deadline, and what goes wrong is a `SinkFault`.
3. A partition is read by batched direct gets (nats-server 2.11 and newer): each is one question with its answer, from
   any replica. There is no consumer on the servers that could stall, vanish with a leader or disagree on where it is.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

import nats.js.errors
from nats.js.api import DiscardPolicy, StorageType, StreamConfig

from tracker_daemon.errors import SchemaError
from tracker_daemon.sink import SinkFault
from tracker_daemon.stream.driver import Client, within
from tracker_daemon.stream.facts import PARTITIONS, facts_of
from tracker_daemon.stream.faults import fault
from tracker_daemon.stream.messages import stream_of, subject_of

if TYPE_CHECKING:
    from collections.abc import Awaitable
    from uuid import UUID

    from nats.aio.msg import Msg
    from nats.js import JetStreamContext

    from tracker_daemon.stream.address import Address
    from tracker_daemon.stream.facts import Facts, Limits
    from tracker_daemon.stream.messages import Message

_CONNECT: Final = 5.0
_TRY: Final = 2
_ASK: Final = 5.0
_READ: Final = 5.0
_CLOSE: Final = 2.0
_NO_MESSAGE: Final = 10037
_WRONG_LAST: Final = 10071
_AFTER: Final = "Nats-Expected-Last-Subject-Sequence"


@dataclass(frozen=True, slots=True)
class Raw:
    """A message of a partition's log."""

    position: int
    headers: dict[str, str]
    body: bytes

    @property
    def stamp(self) -> str | None:
        """When the log took it, in its own words: to the nanosecond, and the same on every replica."""
        return self.headers.get("Nats-Time-Stamp")

    @property
    def taken_at(self) -> float:
        """When the log took it, seconds since 1970; 0 if it does not say."""
        try:
            # To the microsecond: Python reads no nanoseconds.
            return datetime.fromisoformat(self.headers["Nats-Time-Stamp"][:26].rstrip("Z") + "Z").timestamp()
        except (KeyError, ValueError):
            return 0.0


class Elsewhere(Exception):  # noqa: N818 - says what is the case
    """The last message of a subject does not stand where it was."""


@dataclass(slots=True)
class _Asked:
    """A read under way."""

    done: asyncio.Future[None]
    found: list[Raw] = field(default_factory=list)


class Broker:
    """A connection to the servers of *address*, made when it is first needed."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._client: Client | None = None
        self._connecting = asyncio.Lock()
        self._inbox = ""
        self._told: deque[Exception] = deque(maxlen=2 * len(address.servers))
        """What the driver has said of this connection last: of about two rounds over its servers."""
        self._reads: dict[str, _Asked] = {}
        self._numbers = 0
        self.connected_at = 0
        """Counts the connections, also those that the driver makes anew."""

    # -- the connection ----------------------------------------------------------------------------

    async def connect(self) -> Client:
        """Return the connection; make it if there is none.

        Raises:
            SinkFault: no server answers, or none lets us in.
        """
        async with self._connecting:
            client = self._client
            if client is not None and client.is_closed:
                self._client = client = None
            if client is None:
                client = await self._connect()
        if not client.is_connected:
            # The driver goes on trying by itself; a login that is refused meanwhile is told to nobody but `note`.
            told = self._most_telling(f"connecting to {self.address} again")
            if isinstance(told, SinkFault) and told.kind == "auth":
                raise told
            raise SinkFault("connection", f"the servers of {self.address} are away")
        return client

    async def _connect(self) -> Client:
        told, time = self._told, asyncio.get_running_loop().time
        told.clear()
        until = time() + _CONNECT

        async def note(error: Exception) -> None:
            told.append(error)
            if not connecting.done() and time() >= until:
                raise error  # out of the driver's round over the servers, which has no end

        async def again() -> None:
            self.connected_at += 1
            told.clear()

        address = self.address
        login: dict[str, Any] = {}
        if address.user:
            login = {"user": address.user, "password": address.password}
        if address.credentials is not None:
            if find_spec("nkeys") is None:
                raise SinkFault("auth", "?credentials= needs a package that signs with their seed: pip install nkeys")
            login["user_credentials"] = str(address.credentials)
        client = Client()
        connecting = asyncio.create_task(
            client.connect(
                list(address.servers),
                name="tracker-daemon",
                error_cb=note,
                reconnected_cb=again,
                connect_timeout=_TRY,
                reconnect_time_wait=0.2,  # type: ignore[arg-type]  # seconds, which it sleeps
                max_reconnect_attempts=-1,
                ping_interval=10,
                max_outstanding_pings=2,
                **login,
            )
        )
        try:
            await within(_CONNECT + _TRY, connecting)
            self._inbox = client.new_inbox()
            await client.subscribe(f"{self._inbox}.*", cb=self._answered)
        except Exception as error:
            with suppress(Exception):
                await client.close()
            raise (
                self._most_telling(f"connecting to {address}") or fault(error, f"connecting to {address}")
            ) from error
        self.connected_at += 1
        self._client = client
        return client

    def _most_telling(self, doing: str) -> SinkFault | SchemaError | None:
        """Return what the driver has said: a login that was refused, else the last.

        The server that refuses one closes at once, and often that is all that the driver sees.
        """
        faults = [fault(error, doing) for error in self._told]
        refused = [each for each in faults if isinstance(each, SinkFault) and each.kind == "auth"]
        return next(reversed(refused or faults), None)

    async def aclose(self) -> None:
        """Let go of the connection."""
        client, self._client = self._client, None
        if client is not None:
            with suppress(Exception):
                async with asyncio.timeout(_CLOSE):
                    await client.close()

    async def _js(self) -> JetStreamContext:
        return (await self.connect()).jetstream(timeout=_ASK)

    async def _ask(self, doing: str, what: Awaitable[Any]) -> Any:
        try:
            return await what
        except Exception as error:
            raise fault(error, doing) from error

    # -- the streams -------------------------------------------------------------------------------

    async def facts(self, partition: int) -> Facts | None:
        """Return what there is to know of a partition; `None`: it does not exist."""
        name = stream_of(self.address.name, partition)
        js = await self._js()
        try:
            info = await js.stream_info(name)
        except nats.js.errors.NotFoundError:
            return None
        except Exception as error:
            raise fault(error, f"asking for the stream {name}") from error
        return facts_of(partition, info, subject_of(self.address.name, partition, None))

    async def partitions(self) -> list[Facts]:
        """Return what there is to know of every partition.

        Raises:
            SchemaError: the stream is not there, or its partitions disagree; it says what to do.
        """
        name = self.address.name
        first = await self.facts(0)
        if first is None:
            raise SchemaError(
                f"the stream {name} is not there: no JetStream stream {stream_of(name, 0)}. To make it: "
                "tracker-daemon stream create --stream URL --partitions N --replicas 3"
            )
        if not first.partitions:
            raise SchemaError(
                f"the stream {stream_of(name, 0)} was not made by `tracker-daemon stream create`: its metadata lacks "
                f"{PARTITIONS}. Take another name, or delete it"
            )
        found = [first]
        for number in range(1, first.partitions):
            each = await self.facts(number)
            if each is None:
                raise SchemaError(
                    f"the stream {name} has {first.partitions} partitions, and {stream_of(name, number)} is not there. "
                    "`tracker-daemon stream create` with the same numbers makes what is missing"
                )
            if each.partitions != first.partitions:
                raise SchemaError(
                    f"{stream_of(name, 0)} says that there are {first.partitions} partitions, "
                    f"{stream_of(name, number)} says {each.partitions}: two streams were made under one name. "
                    "Delete the one that is wrong"
                )
            found.append(each)
        return found

    async def create(self, partition: int, partitions: int, limits: Limits) -> None:
        """Make a partition; one that is there stays as it is."""
        js = await self._js()
        config = StreamConfig(
            name=stream_of(self.address.name, partition),
            description=f"tracker_daemon, partition {partition} of {partitions}",
            subjects=[subject_of(self.address.name, partition, None)],
            num_replicas=limits.replicas,
            storage=StorageType.FILE,
            # The default would drop the oldest, which was acknowledged, without a word.
            discard=DiscardPolicy.NEW,
            max_bytes=limits.max_bytes,
            duplicate_window=limits.duplicate_window,
            allow_direct=True,
            deny_delete=True,
            metadata={PARTITIONS: str(partitions)},
        )
        await self._ask(f"making the stream {config.name}", js.add_stream(config))

    async def step_down(self, partition: int, preferred: str) -> None:
        """Let *preferred* lead a partition."""
        client = await self.connect()
        subject = f"$JS.API.STREAM.LEADER.STEPDOWN.{stream_of(self.address.name, partition)}"
        asked = json.dumps({"placement": {"preferred": preferred}}).encode()
        await self._ask("moving a leader", client.request(subject, asked, timeout=_ASK))

    async def purge(self, partition: int, before: int) -> None:
        """Remove what stands before the position *before*."""
        js = await self._js()
        name = stream_of(self.address.name, partition)
        await self._ask(f"purging {name}", js.purge_stream(name, seq=before))

    # -- messages ----------------------------------------------------------------------------------

    async def publish(
        self,
        partition: int,
        message: Message,
        timeout: float,  # noqa: ASYNC109 - handed on
        after: int | None = None,
    ) -> int:
        """Return the position of *message* when the stream's quorum has it.

        Args:
            partition: where.
            message: what.
            timeout: seconds for it.
            after: where the last message of its subject must stand; `None`: anywhere.

        Raises:
            Elsewhere: it stands elsewhere, and nothing was stored.
        """
        js = await self._js()
        name = stream_of(self.address.name, partition)
        headers = dict(message.headers)
        if after is not None:
            headers[_AFTER] = str(after)
        try:
            stored = await js.publish(message.subject, message.body, timeout=timeout, stream=name, headers=headers)
        except nats.js.errors.APIError as error:
            if error.err_code == _WRONG_LAST:
                raise Elsewhere from error
            raise fault(error, f"publishing to {name}") from error
        except Exception as error:
            raise fault(error, f"publishing to {name}") from error
        return stored.seq

    async def stamp_at(self, partition: int, position: int) -> str | None:
        """Return when the log took the message at *position*, as `Raw.stamp` has it; `None`: there is none."""
        message = await self._message(partition, {"seq": position}, "asking for the last message applied")
        return None if message is None else message["time"]

    async def last_of(self, partition: int, producer: UUID) -> dict[str, str] | None:
        """Return the headers of a producer's last message in a partition, as the leader knows it; `None`: none."""
        asked = {"last_by_subj": subject_of(self.address.name, partition, producer)}
        message = await self._message(partition, asked, "asking for the producer's last message")
        return None if message is None else _decoded_headers(message.get("hdrs", ""))

    async def _message(self, partition: int, asked: dict[str, Any], doing: str) -> dict[str, Any] | None:
        """Return a message as the leader has it; `None`: there is none."""
        client = await self.connect()
        subject = f"$JS.API.STREAM.MSG.GET.{stream_of(self.address.name, partition)}"
        question = client.request(subject, json.dumps(asked).encode(), timeout=_ASK)
        answer = json.loads((await self._ask(doing, question)).data)
        if (error := answer.get("error")) is not None:
            if error.get("err_code") == _NO_MESSAGE:
                return None
            raise SinkFault("connection", f"{doing}: {error.get('description', error)}")
        found: dict[str, Any] = answer["message"]
        return found

    async def read(self, partition: int, after: int, *, messages: int, size: int) -> list[Raw]:
        """Return the messages behind the position *after*, without a gap: at most *messages*, about *size* bytes.

        An empty list says that the replica asked has none there, no more: see `facts` for where the log ends.
        """
        client = await self.connect()
        self._numbers += 1
        token = str(self._numbers)
        asked = _Asked(asyncio.get_running_loop().create_future())
        self._reads[token] = asked
        subject = f"$JS.API.DIRECT.GET.{stream_of(self.address.name, partition)}"
        question = {"seq": after + 1, "batch": messages, "max_bytes": size}
        try:
            async with asyncio.timeout(_READ):
                await client.publish(subject, json.dumps(question).encode(), reply=f"{self._inbox}.{token}")
                await asked.done
        except Exception as error:
            raise fault(error, f"reading {stream_of(self.address.name, partition)}") from error
        finally:
            del self._reads[token]
        return asked.found

    async def _answered(self, message: Msg) -> None:
        asked = self._reads.get(message.subject.rpartition(".")[2])
        if asked is None or asked.done.done():
            return  # of a read that was given up
        headers = message.headers or {}
        status = headers.get("Status")
        # By the sequence, which the servers add to every message and to nothing else: what somebody published may well
        # have a header that says Status.
        if "Nats-Sequence" in headers:
            asked.found.append(Raw(int(headers["Nats-Sequence"]), headers, message.data))
        elif status in ("204", "404"):
            asked.done.set_result(None)
        else:
            words = next((value for name, value in headers.items() if str(name).lower() == "description"), "")
            asked.done.set_exception(SinkFault("connection", f"the servers answered {status} {words}"))


def _decoded_headers(encoded: str) -> dict[str, str]:
    from base64 import b64decode  # noqa: PLC0415

    lines = b64decode(encoded).decode("utf-8", "replace").split("\r\n")[1:]
    pairs = (line.partition(":") for line in lines if line)
    return {name.strip(): value.strip() for name, _, value in pairs}
