"""Answering a stream: several requests at once, answers in their order, and no more read than is worked on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

Request = TypeVar("Request")
Response = TypeVar("Response")


async def in_order(
    requests: AsyncIterator[Request], answer: Callable[[Request], Awaitable[Response]], at_once: int
) -> AsyncIterator[Response]:
    """Yield the answer to each request in their order.

    The next request is read once fewer than ``at_once`` wait for their answer to be taken, so a client that
    sends faster is held back by the transport. On leaving, what is still worked on is cancelled.

    Args:
        requests: What comes in.
        answer: Answers one; it must not raise, since an error would end the stream for all.
        at_once: Requests that are worked on at once.
    """
    slots = asyncio.Semaphore(at_once)
    working: asyncio.Queue[asyncio.Task[Response] | None] = asyncio.Queue()

    async def answered(request: Request) -> Response:
        return await answer(request)

    async def read() -> None:
        try:
            async for request in requests:
                await slots.acquire()
                working.put_nowait(asyncio.create_task(answered(request)))
        finally:
            working.put_nowait(None)

    reading = asyncio.create_task(read())
    try:
        while (task := await working.get()) is not None:
            yield await task
            slots.release()
        await reading
    finally:
        reading.cancel()
        left = [task for task in _drained(working) if task is not None]
        for task in left:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(reading, *left, return_exceptions=True)


def _drained(working: asyncio.Queue[asyncio.Task[Response] | None]) -> list[asyncio.Task[Response] | None]:
    left = []
    while not working.empty():
        left.append(working.get_nowait())
    return left
