"""What an operator does with a stream: make it, look at it, take it as it is."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

from tracker_daemon.errors import SchemaError
from tracker_daemon.postgres.connection import Connector
from tracker_daemon.postgres.leases import Leases
from tracker_daemon.sink import SinkFault
from tracker_daemon.stream.broker import Broker
from tracker_daemon.stream.facts import DEFAULT_WINDOW, has_no_leader, hole, misfit
from tracker_daemon.stream.messages import lane_of, stream_of

if TYPE_CHECKING:
    from tracker_daemon.postgres.partitions import Place
    from tracker_daemon.stream.address import Address
    from tracker_daemon.stream.facts import Facts, Limits

_PATIENCE = 30.0
_ELECTION = 5.0
_NOBODY = UUID(int=0)
_ADOPT = "To go on with it as it is: tracker-daemon stream adopt --stream URL --database URL"


async def create(address: Address, partitions: int, limits: Limits) -> list[str]:
    """Make the stream, or what is missing of it; return what was made.

    Raises:
        SchemaError: it is there with another number of partitions.
        SinkFault: the servers cannot do it now.
    """
    broker = Broker(address)
    made: list[str] = []
    try:
        first = await _patiently(lambda: broker.facts(0))
        if first is not None and first.partitions != partitions:
            raise SchemaError(
                f"the stream {address.name} is there with {first.partitions} partitions, not {partitions}. Their "
                "number cannot change: threads would change their partition. Make a stream of another name, let the "
                "trackers publish there, and delete this one once consumers have applied all of it"
            )
        for number in range(partitions):
            if await _patiently(lambda number=number: broker.facts(number)) is None:
                await _patiently(lambda number=number: broker.create(number, partitions, limits))
                made.append(stream_of(address.name, number))
        await _spread_leaders(broker, partitions)
    finally:
        await broker.aclose()
    return made


async def _patiently(do: Any) -> Any:
    """Try again for a while: a cluster that has just begun has no leader yet."""
    time = asyncio.get_running_loop().time
    until = time() + _PATIENCE
    while True:
        try:
            return await do()
        except SinkFault as fault:
            if fault.kind not in ("connection", "timeout") or time() > until:
                raise
        await asyncio.sleep(0.5)


async def _spread_leaders(broker: Broker, partitions: int) -> None:
    """Let each server lead its share; the servers themselves do not see to that."""
    facts = await _patiently(broker.partitions)
    servers = sorted({name for each in facts for name in each.peers})
    for each in facts[:partitions]:
        preferred = servers[each.partition % len(servers)] if servers else ""
        if preferred and each.leader != preferred and preferred in each.peers:
            await broker.step_down(each.partition, preferred)
            await _led(broker, each.partition, preferred)


async def _led(broker: Broker, partition: int, preferred: str) -> None:
    """Wait until a partition is led again, for a while; by *preferred* if it comes to that."""
    time = asyncio.get_running_loop().time
    until = time() + _ELECTION
    while time() < until:
        with suppress(SinkFault):
            facts = await broker.facts(partition)
            if facts is not None and facts.leader == preferred:
                return
        await asyncio.sleep(0.1)


@dataclass(frozen=True, slots=True)
class Seen:
    """A partition's state, and what is wrong with it."""

    facts: Facts
    position: int | None
    faults: tuple[str, ...]


async def status(address: Address, database: str | None, table: tuple[str | None, str]) -> list[Seen]:
    """Return every partition's state; with *database* also how far it is applied.

    Raises:
        SchemaError: the stream is not there, or its partitions disagree.
        SinkFault: the servers, or the database, do not answer.
    """
    broker = Broker(address)
    seen: list[Seen] = []
    try:
        found = await broker.partitions()
        if database is None:
            return [Seen(each, None, tuple(_faults(each))) for each in found]
        leases = _leases(address, database, table, len(found))
        try:
            places, creations = await leases.places(_lanes(found)), await leases.creations()
            table_is_another = await leases.other_table()
        finally:
            await leases.disconnect()
        for each in found:
            place, (before, is_read) = places.get(each.partition), creations.get(each.partition, (None, False))
            faults = [*_faults(each), *await _refusals(broker, each, place, before)]
            if not is_read and each.last > (waits := each.first - 1 if place is None else place.position):
                faults.append(f"{each.last - waits} messages wait, and no consumer reads it")
            faults += [] if table_is_another is None else [table_is_another]
            seen.append(Seen(each, None if place is None else place.position, tuple(faults)))
    finally:
        await broker.aclose()
    return seen


def _lanes(found: list[Facts]) -> dict[int, tuple[int, str]]:
    return {each.partition: (lane_of(each.partition), each.created) for each in found}


def _faults(facts: Facts) -> list[str]:
    faults = list(facts.faults)
    if has_no_leader(facts):
        faults.append("it has no leader")
    if facts.duplicate_window < DEFAULT_WINDOW:
        faults.append(f"duplicate_window is {facts.duplicate_window:g} s: repeats are stored, and told in the database")
    if facts.current < facts.replicas:
        faults.append(f"only {facts.current} of {facts.replicas} replicas follow")
    if facts.max_bytes > 0 and facts.bytes > facts.max_bytes * 0.9:
        faults.append(f"it is {facts.bytes / facts.max_bytes:.0%} full: publishers will have to wait")
    return faults


async def _refusals(broker: Broker, facts: Facts, place: Place | None, before: str | None) -> list[str]:
    """Return why a consumer would not read a partition; *before*: the creation of the one that was read."""
    if has_no_leader(facts):
        return []  # nothing is known
    if before is not None and before != facts.created:
        return [f"it was made {facts.created}, the database has applied one made {before}. {_ADOPT}"]
    if place is None and before is not None:
        return [f"its position is gone from tracker_ledger, which was truncated. {_ADOPT}"]
    if place is None:
        gone = "the database has applied nothing of it, and its log has been purged"
        return [f"{gone}. {_ADOPT}"] if facts.first > 1 else []
    words = await _misfit(broker, facts, place)
    if words is None and (following := await _following(broker, facts, place)) > place.position + 1:
        words = hole(stream_of(broker.address.name, facts.partition), place.position, following)
    return [] if words is None else [words]


async def _following(broker: Broker, facts: Facts, place: Place) -> int:
    """Return the position of the first message that is not applied; 0: there is none."""
    found = (
        await broker.read(facts.partition, place.position, messages=1, size=1) if facts.last > place.position else []
    )
    return found[0].position if found else 0


async def _went_back(broker: Broker, facts: Facts, place: Place) -> bool:
    return facts.first <= place.position + 1 and await _misfit(broker, facts, place) is not None


async def _misfit(broker: Broker, facts: Facts, place: Place) -> str | None:
    found = None if place.stamp is None else await broker.stamp_at(facts.partition, place.position)
    return misfit(stream_of(broker.address.name, facts.partition), facts, place.position, place.stamp, found)


async def adopt(address: Address, database: str, table: tuple[str | None, str]) -> list[str]:
    """Let consumers go on with the stream as it is now; return what was adopted, a line a partition."""
    broker = Broker(address)
    try:
        found = await broker.partitions()
        leases = _leases(address, database, table, len(found))
        try:
            await leases.prepare()
            places = await leases.places(_lanes(found))
            for each in found:
                if has_no_leader(each):
                    raise SinkFault("connection", f"partition {each.partition} has no leader now: try again")
                place, first, again = places.get(each.partition), each.first, False
                if place is not None:
                    # A log that went back begins at its first message: what of it was applied its producers' rows tell.
                    again = await _went_back(broker, each, place)
                    first = first if again else max(first, await _following(broker, each, place))
                await leases.adopt(each.partition, lane_of(each.partition), each.created, first, again=again)
        finally:
            await leases.disconnect()
    finally:
        await broker.aclose()
    return [f"{stream_of(address.name, each.partition)} made {each.created}" for each in found]


def _leases(address: Address, database: str, table: tuple[str | None, str], partitions: int) -> Leases:
    return Leases(Connector(database), table, stream=address.name, partitions=partitions, consumer=_NOBODY, lease=0.0)
