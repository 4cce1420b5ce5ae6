"""What the servers say of a partition, and what of it cannot be relied on."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from typing import TYPE_CHECKING, Final

from nats.js.api import DiscardPolicy, StorageType

from tracker_daemon.sink import STREAM_BITS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nats.js.api import StreamInfo

PARTITIONS: Final = "tracker-partitions"
"""The key under which each partition says how many there are."""
DEFAULT_WINDOW: Final = 600.0
_ID_BYTES: Final = 3


@dataclass(frozen=True, slots=True)
class Limits:
    """What a stream is made with; a partition each.

    Attributes:
        replicas: 1, 3 or 5.
        max_bytes: of a partition; when it is full publishers wait.
        duplicate_window: seconds in which the servers themselves drop a message that comes again.
    """

    replicas: int = 3
    max_bytes: int = 1 << 30
    duplicate_window: float = DEFAULT_WINDOW


@dataclass(frozen=True, slots=True)
class Facts:
    """What the servers say of a partition.

    Attributes:
        partition: its number.
        partitions: how many it says that there are; 0: it does not say.
        created: when, as text: a stream that was deleted and made again has another one.
        first, last: sequences in its log; `first` is `last + 1` when it is empty.
        bytes: in it.
        leader: the server that leads; empty without a cluster.
        peers: the servers that hold it.
        replicas: how many there should be.
        current: how many of them follow, the leader among them.
        duplicate_window: as in `Limits`.
        faults: what is set so that it would lose or refuse what it should not.
    """

    partition: int
    partitions: int
    created: str
    first: int
    last: int
    bytes: int
    max_bytes: int
    leader: str
    peers: tuple[str, ...]
    replicas: int
    current: int
    duplicate_window: float = 0.0
    faults: tuple[str, ...] = ()


def facts_of(partition: int, info: StreamInfo, subject: str) -> Facts:
    """Return what *info* says of a partition whose messages have *subject*."""
    config, state, cluster = info.config, info.state, info.cluster
    replicas = config.num_replicas or 1
    followers = [] if cluster is None or cluster.replicas is None else cluster.replicas
    faults = []
    if config.discard != DiscardPolicy.NEW:
        faults.append("discard is not new: when it is full it drops what was acknowledged")
    if config.storage != StorageType.FILE:
        faults.append("storage is not file")
    if not config.max_bytes or config.max_bytes < 0:
        faults.append("max_bytes is not set: it grows until the disk is full")
    if config.max_age:
        faults.append("max_age is set: it drops what was acknowledged")
    if (config.max_msgs or -1) > 0 or (config.max_msgs_per_subject or -1) > 0:
        faults.append("a limit on messages is set: it drops what was acknowledged, or refuses what would fit")
    if not config.allow_direct:
        faults.append("allow_direct is off: it cannot be read")
    if config.subjects != [subject]:
        faults.append(f"its subjects are {config.subjects}, not {subject}")
    leader = (cluster.leader or "") if cluster is not None else ""
    metadata = (config.metadata or {}).get(PARTITIONS, "")
    created = info.created or datetime.fromtimestamp(0, UTC)
    return Facts(
        partition=partition,
        partitions=int(metadata) if metadata.isdigit() else 0,
        created=created.astimezone(UTC).isoformat(),
        first=max(1, state.first_seq),
        last=state.last_seq,
        bytes=state.bytes,
        max_bytes=config.max_bytes or -1,
        leader=leader,
        peers=tuple(name for name in (leader, *(peer.name for peer in followers)) if name),
        replicas=replicas,
        current=1 + sum(bool(peer.current) and not peer.offline for peer in followers),
        duplicate_window=config.duplicate_window or 0.0,
        faults=tuple(faults),
    )


def identity(name: str, partitions: Sequence[Facts]) -> int:
    """Return a number for this stream, as a system identifier is one for a database, and never equal to one.

    The upper half is of the name and the number of partitions, the lower of when they were made.
    """
    made = " ".join(each.created for each in partitions)
    halves = (blake2b(text.encode(), digest_size=_ID_BYTES).digest() for text in (f"{name}/{len(partitions)}", made))
    return int.from_bytes(b"".join(halves)) | 1 << STREAM_BITS


def hole(name: str, position: int, following: int) -> str:
    """Return what is said of a log in which messages are missing behind *position*."""
    return (
        f"in the log of {name} message {following} follows {position}: {following - position - 1} messages between "
        "them are gone that were not applied, as by a purge of a subject. To go on without them: "
        "tracker-daemon stream adopt --stream URL --database URL"
    )


def has_no_leader(facts: Facts) -> bool:
    """Say whether nobody leads a partition: a replica that may be behind has answered then."""
    return facts.replicas > 1 and not facts.leader


def misfit(name: str, facts: Facts, position: int, applied: str | None, found: str | None) -> str | None:
    """Return why a log does not go on where the database stands, and what to do; `None`: it does.

    Args:
        name: of its stream.
        facts: what the servers say of it.
        position: the last message applied.
        applied: when that was taken, as the database has it; `None`: not known.
        found: when the one there was taken, as the log has it; `None`: it is not there.
    """
    went_back = None
    if facts.last < position:
        went_back = f"the log of {name} ends at {facts.last}, and {position} is applied"
    elif facts.first <= position and None not in (applied, found) and applied != found:
        went_back = (
            f"message {position} in the log of {name} was taken {found}, the one that is applied was taken {applied}"
        )
    if went_back is not None:
        return (
            f"{went_back}: an older copy of the log was restored, or it has lost what it had acknowledged. Nothing is "
            "applied until it is known which. To read it again from its first message, with what was applied already "
            "by producers that the ledger does not know once more: "
            "tracker-daemon stream adopt --stream URL --database URL"
        )
    if facts.first > position + 1:
        return (
            f"the log of {name} begins at {facts.first}, and only {position} is applied: "
            f"{facts.first - position - 1} messages are gone from it that this database has not seen. "
            "The database was restored from an old backup, or is another one. To go on without them: "
            "tracker-daemon stream adopt --stream URL --database URL"
        )
    return None


def is_same_but_for_time(one: int, other: int) -> bool:
    """Say whether two identities are of the same name and number of partitions, whenever they were made."""
    return one >> 8 * _ID_BYTES == other >> 8 * _ID_BYTES
