"""Refuses to start a command where the system's limits are so low that a library would abort the process.

XLA, Orbax and OpenBLAS abort it, with a long trace, if they can't start their threads or get memory for them. The check
starts some threads and reserves memory at once, which takes a few milliseconds, and touches none of it.
"""

import mmap
import os
import threading

MEBIBYTE = 1 << 20
# what each command takes at least; the others start with little
_READING, _COMPILING = 256 * MEBIBYTE, 512 * MEBIBYTE
NEEDED: dict[str, int] = dict.fromkeys(("convert", "export"), _READING)
NEEDED |= dict.fromkeys(("verify", "generate", "serve", "bench", "demo"), _COMPILING)
_MOST_THREADS = 64


def check(command: str | None) -> None:
    """Checks what a command needs.

    Raises:
        ValueError: the process may not have as much memory or as many threads; one line with the remedy.
    """
    if command is None or command not in NEEDED:
        return
    size, count = NEEDED[command], min(_MOST_THREADS, 8 + 4 * (os.cpu_count() or 1))
    done, threads = threading.Event(), []
    try:
        with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS):
            for _ in range(count):
                thread = threading.Thread(target=done.wait)
                thread.start()
                threads.append(thread)
    except (OSError, MemoryError):
        raise ValueError(
            f"{command} needs {size // MEBIBYTE} MiB of memory to start, more than this process may have: raise its "
            "limit (ulimit -d and -v)"
        ) from None
    except RuntimeError:
        raise ValueError(
            f"{command} needs {count} threads to start, and this process gets {len(threads)}: raise the limit on "
            "processes (ulimit -u, or pids of the container), or that on memory, which has their stacks (ulimit -d, -v)"
        ) from None
    finally:
        done.set()
        for thread in threads:
            thread.join()
