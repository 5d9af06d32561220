"""Servers that run in threads and that tests reach over loopback."""

import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def running[S: socketserver.BaseServer](server: S) -> Iterator[S]:
    """Runs the server in a thread until the block ends."""
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
