"""What the servers and the driver say that went wrong, as the port's exceptions."""

from __future__ import annotations

from typing import Final

import nats.errors
import nats.js.errors

from tracker_daemon.errors import SchemaError
from tracker_daemon.sink import SinkFault

_NOT_STORED: Final = 10077
_FULL: Final = 10047


class Unencrypted(nats.errors.Error):
    """A server does not do what `tls://` asks for."""


def fault(error: BaseException, doing: str) -> SinkFault | SchemaError:  # noqa: PLR0911 - a return a kind
    """Return *error* as the port's exception."""
    if isinstance(error, SinkFault | SchemaError):
        return error
    words = " ".join(str(error).split()) or type(error).__name__
    text = f"{doing}: {words}"
    # The driver's own, without a code, says that nobody has answered.
    unanswered = isinstance(error, nats.js.errors.ServiceUnavailableError) and error.code is None
    if unanswered or isinstance(error, nats.js.errors.NoStreamResponseError | nats.errors.NoRespondersError):
        return SinkFault("connection", f"{doing}: no server leads the stream now, it is not there, or JetStream is off")
    if isinstance(error, nats.js.errors.APIError):
        return _of_the_api(error, text, doing)
    if isinstance(error, Unencrypted):
        return SinkFault("auth", text)
    if isinstance(error, nats.errors.AuthorizationError) or "authorization" in words.lower():
        return SinkFault("auth", f"{text}. The servers do not know this login, or no longer: correct it in the URL")
    if isinstance(error, TimeoutError):
        return SinkFault("timeout", f"{doing}: no answer in time")
    if isinstance(error, nats.errors.MaxPayloadError):
        return SinkFault("other", f"{doing}: the servers take messages of less than 512 KB; raise max_payload")
    return SinkFault("connection" if isinstance(error, nats.errors.Error | OSError) else "other", text)


def _of_the_api(error: nats.js.errors.APIError, text: str, doing: str) -> SinkFault | SchemaError:
    # The first is of whatever keeps a message from being stored, a full stream among it.
    if error.err_code == _FULL or (error.err_code == _NOT_STORED and "exceeded" in text):
        return SinkFault("capacity", f"{doing}: the stream is full; consumers are behind, or max_bytes is small")
    if isinstance(error, nats.js.errors.NotFoundError):
        return SchemaError(f"{text}. To make it: tracker-daemon stream create")
    return SinkFault("connection" if (error.code or 500) >= 500 else "other", text)
