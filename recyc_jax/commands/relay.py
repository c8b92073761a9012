"""A relay on this machine between JAX's client of the coordination service and the service, which process 0 hosts.

JAX's client aborts its process, with a stack trace, the moment its connection to the service ends. Behind a relay it
sees no end: the relay notes it, and `companions.py` ends the process with a line that says which process is gone."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

_PATIENCE = 20.0  # seconds; after this long without an answer the client gives up a connection and opens the next


class Relay:
    """Forwards connections to `address` (HOST:PORT) from a port on this machine. Raises OSError if none is free."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._target = host.strip("[]"), int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = "{}:{}".format(*self._listener.getsockname())
        self._kept: list[socket.socket] = []  # connections of the client whose other end is gone
        self._lost, self._keeps = False, False
        threading.Thread(target=self._accept, name="relay", daemon=True).start()

    @property
    def lost(self) -> bool:
        """Whether the service answered before, and then closed the connection that the client still holds."""
        return self._lost

    def keep(self) -> None:
        """From now on, until `release`, the client does not see that the service has ended the connection. Before, while
        processes look for each other, the client tries again."""
        self._keeps = True

    def release(self) -> None:
        """From now on the client sees the end of the connection: it expects it."""
        self._keeps = False
        for client in self._kept:
            _close(client)

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            threading.Thread(target=self._forward, args=(client,), name="relay", daemon=True).start()

    def _forward(self, client: socket.socket) -> None:
        service = self._reach()
        if service is None:
            _close(client)
            return
        for side in (client, service):
            side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        left = threading.Event()
        threading.Thread(target=_send, args=(client, service, left), name="relay", daemon=True).start()
        answered = False
        while (data := _received(service)) and not left.is_set():
            answered, self._lost = True, False
            if not _sent(client, data):
                left.set()
        _close(service)
        if not answered or left.is_set() or not self._keeps:
            _close(client)
            return
        self._kept.append(client)
        self._lost = True

    def _reach(self) -> socket.socket | None:
        """A connection to the service; None if it does not listen for long."""
        until = time.monotonic() + _PATIENCE
        while time.monotonic() < until:
            try:
                found = socket.create_connection(self._target, timeout=_PATIENCE)
            except OSError:
                time.sleep(0.2)
            else:
                found.settimeout(None)
                return found
        return None


def _send(client: socket.socket, service: socket.socket, left: threading.Event) -> None:
    """Forward what the client sends. Sets `left` when the client has ended the connection."""
    while data := _received(client):
        if not _sent(service, data):
            return
    left.set()
    with contextlib.suppress(OSError):
        service.shutdown(socket.SHUT_WR)


def _close(side: socket.socket) -> None:
    """Close a connection that another thread may be reading from: `close` alone would wait for the reader."""
    with contextlib.suppress(OSError):
        side.shutdown(socket.SHUT_RDWR)
    side.close()


def _received(side: socket.socket) -> bytes:
    """What arrives next; nothing if the connection has ended."""
    try:
        return side.recv(1 << 16)
    except OSError:
        return b""


def _sent(side: socket.socket, data: bytes) -> bool:
    try:
        side.sendall(data)
    except OSError:
        return False
    return True
