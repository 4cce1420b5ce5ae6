"""A proxy between clients and a daemon: it moves them from one daemon to another, and loses answers."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import Self


class Between:
    """Listens on a Unix socket, and hands what comes to the daemon at `target`: a socket's path, or host and port.

    Args:
        path: where it listens.
        target: where the daemon is; may be set to another one at any time.
        lose_every: of how many answers to a batch one is lost, its connection cut, after the daemon has given it.
    """

    def __init__(self, path: str, target: str | tuple[str, int], *, lose_every: int = 0) -> None:
        self.path, self.target, self.lose_every = path, target, lose_every
        self.answers = self.lost = 0
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._closed = False

    @property
    def url(self) -> str:
        """What a `Tracker` is given."""
        return f"unix:{self.path}"

    def move(self, target: str | tuple[str, int]) -> None:
        """Send everybody to another daemon: what is open is cut, what comes goes there."""
        with self._lock:
            self.target = target
            for each in self._open:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        self._listener.bind(self.path)
        self._listener.listen(256)
        self._start(self._accept)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._closed = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.move(self.target)
        for thread in self._threads:
            thread.join()
        Path(self.path).unlink(missing_ok=True)

    def _start(self, do: object, *arguments: object) -> None:
        thread = threading.Thread(target=do, args=arguments)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        where = self.target
        with client, socket.socket(socket.AF_UNIX if isinstance(where, str) else socket.AF_INET) as daemon:
            try:
                daemon.connect(where)
            except OSError:
                return
            with self._lock:
                self._open |= {client, daemon}
            back = threading.Thread(target=self._pump, args=(daemon, client, True))
            back.start()
            self._pump(client, daemon, answers=False)
            back.join()
            with self._lock:
                self._open -= {client, daemon}

    def _pump(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        with suppress(OSError):
            while part := source.recv(65_536):
                if answers and self._loses(part):
                    break
                sink.sendall(part)
        for each in (source, sink):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _loses(self, part: bytes) -> bool:
        if not self.lose_every or b'"rows"' not in part:
            return False
        with self._lock:
            self.answers += 1
            lose = self.answers % self.lose_every == 0
            self.lost += lose
        return lose
