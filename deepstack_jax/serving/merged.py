"""Several asynchronous generators read as one."""

import asyncio
from collections.abc import AsyncGenerator, Collection, Iterable, Sequence
from contextlib import AsyncExitStack
from typing import Any

from deepstack_jax.disagg.tasks import settle


def closing_all(sources: Iterable[AsyncGenerator[Any]]) -> AsyncExitStack:
    """A context that closes all sources at its end."""
    stack = AsyncExitStack()
    for source in sources:
        stack.push_async_callback(source.aclose)
    return stack


async def merged[T](sources: Sequence[AsyncGenerator[T]], ended: Collection[int] = ()) -> AsyncGenerator[tuple[int, T]]:
    """The items of all sources as they come, each with its source's number.

    A source whose number the reader adds to `ended` is closed after its next item.

    The first error ends all. Closing it ends the tasks that read the sources; the sources are closed by their owner.
    """
    waiting = {asyncio.ensure_future(anext(source)): number for number, source in enumerate(sources)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=waiting.__getitem__):
                number = waiting.pop(task)
                try:
                    item = task.result()
                except StopAsyncIteration:
                    continue
                yield number, item
                if number in ended:
                    await sources[number].aclose()
                    continue
                waiting[asyncio.ensure_future(anext(sources[number]))] = number
    finally:
        await settle(*waiting)
