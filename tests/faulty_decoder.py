"""A decoder process in which calls fail: `python -m tests.faulty_decoder LIBRARY FILE ARGUMENTS`.

For each task it arms the library (see `failing_calls.py`) as FILE says, in JSON.
"""

import json
import socket
import sys
from pathlib import Path

from deepstack_jax.processing import decoder_process
from tests.failing_calls import FailingCalls


def main(library: FailingCalls, armed: Path, arguments: list[str]) -> None:
    """Runs the decoder."""
    receive = decoder_process._receive

    def receive_armed(connection: socket.socket) -> tuple[memoryview, memoryview] | None:
        library.arm("", "-")
        connection.recv(1, socket.MSG_PEEK)  # a task has come
        library.arm("", **json.loads(armed.read_text()))
        return receive(connection)

    decoder_process._receive = receive_armed
    decoder_process.main(*map(int, arguments))


if __name__ == "__main__":
    main(FailingCalls(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
