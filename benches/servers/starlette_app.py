"""The same by sse-starlette: a queue for each client."""

import asyncio
import json
import time

from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

PADDING = "x" * 200
listeners = set()


async def stream(request):
    async def generate():
        waiting = asyncio.Queue()
        listeners.add(waiting)
        try:
            yield {"comment": "hello"}
            while True:
                yield await waiting.get()
        finally:
            listeners.discard(waiting)

    return EventSourceResponse(generate())


tasks = set()


async def publish(request):
    first, count = (int(request.query_params[name]) for name in ("first", "count"))
    pause = float(request.query_params["pause"])

    async def run():
        await asyncio.sleep(0.5)
        for n in range(first, first + count):
            message = {"data": json.dumps({"n": n, "t": time.monotonic_ns(), "text": PADDING})}
            for waiting in listeners:
                waiting.put_nowait(message)
            if pause:
                await asyncio.sleep(pause)

    task = asyncio.create_task(run())
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return JSONResponse({})


app = Starlette(routes=[Route("/stream/", stream), Route("/publish/", publish)])
