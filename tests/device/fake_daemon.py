"""A device that misbehaves before it can be used: speaks just enough of adb's protocol to a real adb server."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Literal

_HEADER = struct.Struct("<6I")  # command, two arguments, length, checksum, command inverted
_AUTH, _TOKEN = 0x48545541, 1


@contextlib.contextmanager
def daemon(behaviour: Literal["never trusts", "never answers"]) -> Iterator[str]:
    """Have such a device for a block; gives its address, to `adb connect` to."""
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_serve, args=(listener, behaviour), daemon=True).start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()


def _serve(listener: socket.socket, behaviour: str) -> None:
    with contextlib.suppress(OSError):  # closed by either side: the test is over
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=_talk, args=(connection, behaviour), daemon=True).start()


def _talk(connection: socket.socket, behaviour: str) -> None:
    with contextlib.suppress(OSError), connection:
        while header := connection.recv(_HEADER.size, socket.MSG_WAITALL):
            length = _HEADER.unpack(header)[3]
            connection.recv(length, socket.MSG_WAITALL)
            if behaviour == "never trusts":
                # Whatever it is given, a signature or a key, it asks to sign another token.
                token = bytes(20)
                message = _HEADER.pack(_AUTH, _TOKEN, 0, len(token), sum(token), _AUTH ^ 0xFFFFFFFF)
                connection.sendall(message + token)
