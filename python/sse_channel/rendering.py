"""Rendering once: what is published is turned into what is sent, for all clients that share it.

A rendering takes the events of its channels and puts what became of them into a channel of its own
inside the extension, under the same ids; its streams are clients of that. So a client more costs no
call of the renderer, resumes like any other, and can be offloaded. A few threads of the process
(greenlets, where gevent has put them in the place of threads) render for all of its renderings, one
event after the other of each.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import functools
import inspect
import logging
import os
import sys
import threading
import time
import types
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Hashable, Iterator, Sequence
from queue import Empty
from typing import Any, NamedTuple, TypeAlias

from . import _sse_channel
from .config import options
from .event import Event, envelope, to_fields
from .queue import ClientQueue
from .waiting import after_close, close_at_exit

__all__ = ["ERROR_EVENT", "Renderer", "figures", "on_threads", "render_within"]

#: The event that clients get in place of one whose rendering failed.
ERROR_EVENT = "stream-error"

#: Events that wait to be rendered for one rendering at the most.
_CAPACITY = 10_000

#: Events that are rendered for one rendering before it is the turn of another.
_TURN = 16

#: Seconds, with work or without, after which a thread gives back what it has, its database
#: connections.
_REST = 1.0

#: Seconds that a rendering waits for its first client.
_FIRST = 1.0

#: Seconds after which a rendering without clients ends, and a thread without renderings.
_LINGER = 60.0

_NO_LOOP = (
    "an asynchronous render needs a running asyncio loop, or threads that gevent has not patched: "
    "while one greenlet runs a loop, all others seem to be on it; make render a plain function, in "
    "which greenlets yield to each other as well"
)

_logger = logging.getLogger("sse_channel")

#: Set in what threads that render do.
_renders = contextvars.ContextVar("sse_channel_renders", default=False)

_surroundings: list[Callable[[], contextlib.AbstractContextManager[None]]] = []


def render_within(make: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
    """Have threads that render do so within what `make` gives.

    It is entered in the thread, and left when the thread has nothing to do, after an error, and
    once a second.
    """
    if make not in _surroundings:
        _surroundings.append(make)


class Renderer:
    """What a stream is opened with: the channels, `render=` and `key=`.

    Raises:
        TypeError: a `render` that cannot be called, or a `key` that cannot be hashed.
        ValueError: a `render` that is made anew for each client, without a `key` that says which
            clients share it.
    """

    __slots__ = ("call", "channels", "code", "key", "loop")

    def __init__(
        self, channels: Sequence[_sse_channel.Channel], render: Any, key: Hashable | None
    ) -> None:
        if not callable(render):
            raise TypeError(f"render must be a callable, not {type(render).__name__}")
        try:
            hash(key)
        except TypeError:
            raise TypeError(
                f"key must be hashable, as a str or a tuple is, not {type(key).__name__}"
            ) from None
        self.channels = list(channels)
        self.call: Callable[[Any], Any] = render
        self.key = key
        self.code = _code(render, key)
        running = asyncio._get_running_loop()
        self.loop = None if running is None else weakref.ref(running)
        if running is None and inspect.iscoroutinefunction(render) and _are_threads_greenlets():
            raise TypeError(_NO_LOOP)

    def register(
        self, stream: _sse_channel.Stream, last_event_id: str | None, retry: int, timeout: float
    ) -> str | None:
        """Register `stream`, when all that it missed is rendered; as `_sse_channel.register`."""
        steps = self.registering(stream, last_event_id, retry, timeout, waits=True)
        try:
            while True:
                next(steps)
        except StopIteration as done:
            reason: str | None = done.value
            return reason

    def registering(
        self,
        stream: _sse_channel.Stream,
        last_event_id: str | None,
        retry: int,
        timeout: float,
        *,
        waits: bool = False,
    ) -> Generator[Rendering, None, str | None]:
        """What `register` does, as steps of a job, each of which gives whom it waits for.

        With `waits`, it is not a thread that renders which does it, and it waits for those.
        """
        while True:
            rendering = _desk().rendering(self, timeout)
            with rendering.expecting():
                if last_event_id and rendering.lacks(last_event_id):
                    # Before it takes a thread from the others: the bus may be away.
                    rendering.prepare(self.channels, last_event_id, timeout)
                    if waits:
                        rendering.desk.do(functools.partial(rendering.catch_up, last_event_id))
                    else:
                        for busy in rendering.catch_up(last_event_id):
                            yield busy
                            if stream.closed:
                                return None
                try:
                    reason = rendering.register(stream, last_event_id, retry)
                except _sse_channel.ChannelClosed:
                    if stream.closed:
                        return None
                    raise
                if reason is not False:
                    return reason
            # It came to its end between the two, or it is one that the bus let go of.
            rendering.end(0.0)
            rendering.desk.forget(rendering)


def _code(render: Any, key: Hashable | None) -> Hashable:
    """What tells one way to render from another, although its function is made anew each time."""
    code: Any = render
    is_made_anew = False
    of: object = None
    while isinstance(code, functools.partial):
        code, is_made_anew = code.func, True
    if isinstance(code, types.MethodType):
        of, code = code.__self__, code.__func__
        if not isinstance(of, (type, types.ModuleType)):
            # An object of which there may be one for each client.
            of, is_made_anew = None, True
    if isinstance(code, types.FunctionType):
        is_nested = "<locals>" in code.__qualname__ or code.__name__ == "<lambda>"
        # A default value may hold what the view knows of one client.
        has_defaults = bool(code.__defaults__ or code.__kwdefaults__)
        is_made_anew |= code.__closure__ is not None or (is_nested and has_defaults)
        # Beside the code, which is equal to that of another decorator's or module's function.
        code = (code.__module__, code.__qualname__, code.__code__)
    if is_made_anew and key is None:
        raise ValueError(
            "render is a closure, a partial or a method: it may differ from client to client; give "
            "key= as well, a value that is equal for those clients that share what it makes "
            "(key=last_n), or make render a plain function"
        )
    return (of, code if isinstance(code, Hashable) else id(code))


class Rendering(_sse_channel.Rendering):
    """What one `render` makes of the events of some channels, for the clients of one key.

    It does not hold the channels: a private one is to end when its user lets go of it.
    """

    __slots__ = (
        "_dropped",
        "_expected",
        "_later",
        "_lock",
        "_loop",
        "_owner",
        "_render",
        "desk",
        "identity",
    )

    def __init__(self, capacity: int, renderer: Renderer, identity: Hashable, desk: _Desk) -> None:
        self.identity = identity
        self.desk = desk
        self._render = renderer.call
        self._loop = renderer.loop
        # Of the events of one rendering, one is rendered at a time.
        self._lock = threading.Lock()
        # `threading.get_ident` of who has it.
        self._owner: int | None = None
        # What has come while a thread had the lock.
        self._later: deque[_Work] = deque()
        # One for each client for which it catches up.
        self._expected: set[object] = set()
        self._dropped = 0

    def run(self) -> None:
        """Render some of what waits; it is put into the desk again when there is more."""
        if not self._lock.acquire(blocking=False):
            self.put_off(self)
            return
        self._owner = threading.get_ident()
        try:
            for _ in range(_TURN):
                # Not one that has just begun, whose first client is about to come.
                if self.is_forsaken(_FIRST):
                    # The next client begins another.
                    self.desk.forget(self)
                    return
                event = self._next()
                if event is None:
                    return
                self._do(event, back=False)
        finally:
            self._release()
            self.rest()

    @contextlib.contextmanager
    def expecting(self) -> Iterator[None]:
        """It is not over within for want of clients, however long the catching up takes."""
        client = object()
        self._expected.add(client)
        try:
            yield
        finally:
            self._expected.discard(client)

    def is_forsaken(self, patience: float) -> bool:
        """End it, if it had no client for so many seconds, and has none to expect."""
        return not self.in_use and not self._expected and self.end(patience)

    def catch_up(self, last_event_id: str) -> Iterator[Rendering]:
        """Render what a client that resumes has to get, as far as there is any of it.

        Steps, each of which gives whom it waits for: this rendering, while a thread is at it or
        after its turn. Of two that resume at once, one renders and the other finds it. Done by a
        thread that renders: what becomes of an event is for others, too, and must not depend on the
        request of the client that came first, its language or its transaction.
        """
        # Of those that wait when it begins: of what is published faster than it is rendered there
        # is always more.
        waiting: int | None = None
        while True:
            while not self._lock.acquire(blocking=False):
                yield self
            self._owner = threading.get_ident()
            try:
                if not self.lacks(last_event_id):
                    return
                if waiting is None:
                    waiting = self.waiting()
                # First: what other processes have rendered already, a client may have had.
                for _ in range(min(waiting, _TURN)):
                    event = self._next()
                    if event is None:
                        waiting = 0
                        break
                    self._do(event, back=False)
                    waiting -= 1
                if waiting <= 0:
                    for event in self.missing(last_event_id):
                        self._do(event, back=True)
                    self.read_back()
                    return
            finally:
                self._release()
            yield self

    def wait(self) -> None:
        """Wait until no thread is at it.

        Raises:
            RuntimeError: this thread is.
        """
        if self._owner == threading.get_ident():
            raise RuntimeError(
                f"render={self._render!r} opens a stream that it must render itself, of the same "
                "channels and key, and would wait for itself"
            )
        self._lock.acquire()
        self._release()

    def put_off(self, work: _Work) -> None:
        """Have `work` done when the thread that is at it is ready: one rendering holds up one."""
        self._later.append(work)
        if self._lock.acquire(blocking=False):
            # It was ready before it could see this.
            self._release()

    def _release(self) -> None:
        self._owner = None
        self._lock.release()
        while self._later:
            # Another thread may take the last one meanwhile.
            with contextlib.suppress(IndexError):
                self.desk.give(self._later.popleft())

    def _next(self) -> _sse_channel.SourceEvent | None:
        # Before the take: what is lost after this look may come after the event. Then there is a
        # next one, because only a full queue loses any, and it tells of that.
        dropped = self.dropped
        event = self.take()
        if event is not None and dropped != self._dropped:
            self._dropped = dropped
            _logger.warning(
                "render=%r is too slow for what is published: %d events were lost so far; its "
                "clients were told by a stream-reset",
                self._render,
                dropped,
            )
            self.lose(event)
        return event

    def _do(self, event: _sse_channel.SourceEvent, *, back: bool) -> None:
        if not event.has_message:
            self.pass_on(event, back)
            return
        try:
            rendered = self._call(event.message)
            if rendered is None:
                self.skip(event, back)
                return
            sent = rendered if isinstance(rendered, Event) else envelope(rendered, event.event)
            fields = to_fields(sent)
            self.put(
                event,
                fields.data,
                json=fields.json,
                event=fields.event,
                retry=fields.retry,
                comment=fields.comment,
                limit=options().max_event_bytes,
                back=back,
            )
            self.desk.rendered += 1
        except BaseException as error:
            self.desk.errors += 1
            _logger.exception(
                "render=%r failed for event %s; its clients got an event %r in its place",
                self._render,
                event.id,
                ERROR_EVENT,
            )
            self.put(
                event,
                '{"reason":"render-failed"}',
                json=True,
                event=ERROR_EVENT,
                retry=None,
                comment=None,
                limit=1 << 10,
                back=back,
            )
            if not isinstance(error, (Exception, asyncio.CancelledError)):
                # The end of this thread or greenlet, not of the rendering.
                raise

    def _call(self, message: Any) -> Any:
        # What it activates, a language, is not for the next one.
        context = contextvars.copy_context()
        rendered = context.run(self._render, message)
        if not inspect.isawaitable(rendered):
            return rendered
        loop = None if self._loop is None else self._loop()
        if loop is None or not loop.is_running():
            if _are_threads_greenlets():
                if inspect.iscoroutine(rendered):
                    rendered.close()
                raise TypeError(_NO_LOOP)
            return context.run(asyncio.run, _awaited(rendered))
        future = context.run(asyncio.run_coroutine_threadsafe, _awaited(rendered), loop)
        while True:
            done, _ = concurrent.futures.wait([future], timeout=_REST)
            if done:
                return future.result()
            if not loop.is_running():
                future.cancel()
                raise RuntimeError("the event loop on which render ran has stopped")


def _are_threads_greenlets() -> bool:
    """Whether gevent has patched threads: then one that runs a loop stands in each other's way."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("threading"))


async def _awaited(pending: Awaitable[Any]) -> Any:
    return await pending


class _Surroundings:
    """What a thread renders within, if it is within it now."""

    def __init__(self, desk: ClientQueue) -> None:
        self._desk = desk
        self._entered: contextlib.ExitStack | None = None
        self._since = 0.0

    def enter(self) -> None:
        if self._entered is not None and time.monotonic() - self._since < _REST:
            return
        # A connection that is used without a rest would never be looked after.
        self.leave()
        self._entered, self._since = contextlib.ExitStack(), time.monotonic()
        for make in _surroundings:
            try:
                self._entered.enter_context(make())
            except Exception:
                _logger.exception("what rendering happens within could not be entered")

    def leave(self) -> None:
        entered, self._entered = self._entered, None
        try:
            if entered is not None:
                entered.close()
        except Exception:
            # At the exit, threads that would close it may have ended.
            if not self._desk.closed:
                _logger.exception("a database connection of a renderer could not be closed")


class _Job:
    """Something else than a rendering that threads do, step by step."""

    def __init__(
        self,
        desk: _Desk,
        steps: Iterator[Rendering],
        tell: Callable[[Exception | None], object],
    ) -> None:
        self._desk = desk
        self._steps = steps
        self._tell = tell

    def run(self) -> None:
        """Do one step."""
        error: BaseException | None = None
        try:
            busy = next(self._steps)
        except StopIteration:
            pass
        except BaseException as raised:
            error = raised
        else:
            busy.put_off(self)
            return
        self.finish(error)
        if error is not None and not isinstance(error, Exception):
            # The end of this thread or greenlet.
            raise error

    def finish(self, error: BaseException | None) -> None:
        """Tell who waits for it, once."""
        if self._desk.forget_job(self):
            self._tell(_to_tell(error))


def _to_tell(error: BaseException | None) -> Exception | None:
    """An error as it is told to who waits: not the end of its thread, greenlet or loop."""
    if error is None or isinstance(error, Exception):
        return error
    told = RuntimeError(f"the thread that rendered was ended: {error!r}")
    told.__cause__ = error
    return told


def _all_at_once(steps: Iterator[Rendering]) -> None:
    """Do the steps here, as what renders must: all threads that could do them may wait for that."""
    for busy in steps:
        busy.wait()


#: What a thread that renders does.
_Work: TypeAlias = "Rendering | _Job"


class _Answer(NamedTuple):
    """That a job is done, and what it raised."""

    error: Exception | None


class _Desk:
    """The renderings of this process, and the threads that render."""

    def __init__(self) -> None:
        self.rendered = 0
        self.errors = 0
        self._renderings: dict[Hashable, Rendering] = {}
        self._swept = time.monotonic()
        self._threads = 0
        # Those that wait, and those that are being done.
        self._jobs: set[_Job] = set()
        # Held for a look.
        self._lock = threading.Lock()
        self._channel = _sse_channel.Channel(None, 0)
        self._queue = ClientQueue(1 << 62, "drop_newest")
        _sse_channel.register(self._queue, [self._channel], None, 0, 0.0)
        close_at_exit()
        after_close(self.end)

    def rendering(self, renderer: Renderer, timeout: float) -> Rendering:
        """The rendering that clients of `renderer` share, begun by the first of them."""
        numbers = tuple(sorted({channel.number() for channel in renderer.channels}))
        identity = (numbers, renderer.code, renderer.key)
        with self._lock:
            known = self._renderings.get(identity)
            if known is not None:
                self._begin_threads()
                return known
            self._sweep(at_most_every=_REST)
        # Not under the lock: it may have to wait for the bus.
        rendering = Rendering(_CAPACITY, renderer, identity, self)
        rendering.begin(renderer.channels, self._queue, timeout)
        with self._lock:
            # Another client may have begun it meanwhile.
            known = self._renderings.setdefault(identity, rendering)
            self._begin_threads()
        if known is not rendering:
            rendering.end(0.0)
        return known

    def forget(self, rendering: Rendering) -> None:
        """It is over."""
        with self._lock:
            if self._renderings.get(rendering.identity) is rendering:
                del self._renderings[rendering.identity]

    def figures(self) -> dict[str, int]:
        with self._lock:
            return {
                "renderings": len(self._renderings),
                "rendered": self.rendered,
                "errors": self.errors,
            }

    def _begin_threads(self) -> None:
        # A job may be to begin a rendering, while those that there are keep a thread each.
        wanted = len(self._renderings) + len(self._jobs)
        if self._threads >= min(wanted, options().render_threads):
            return
        self._threads += 1
        # In a context of its own: a greenlet has that of the request in which it was begun.
        work = functools.partial(contextvars.Context().run, self._work)
        try:
            threading.Thread(target=work, name="sse-channel-render", daemon=True).start()
        except RuntimeError:
            # The machine gives no more threads: those that run do it.
            self._threads -= 1
            if not self._threads:
                raise

    def run(self, steps: Iterator[Rendering]) -> asyncio.Future[None]:
        """Have threads that render do the steps, for a coroutine that awaits it."""
        loop = asyncio.get_running_loop()
        done = loop.create_future()

        def resolve(error: Exception | None) -> None:
            if done.cancelled():
                return
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)

        def tell(error: Exception | None) -> None:
            # A loop that is closed has nobody who awaits it.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(resolve, error)

        if not _renders.get():
            self._begin(_Job(self, steps, tell))
            return done

        def here() -> None:
            error: BaseException | None = None
            surroundings = _Surroundings(self._queue)
            surroundings.enter()
            try:
                _all_at_once(steps)
            except BaseException as raised:
                error = raised
            finally:
                surroundings.leave()
            tell(_to_tell(error))

        # In this context: what it renders may do the same.
        work = functools.partial(contextvars.copy_context().run, here)
        threading.Thread(target=work, name="sse-channel-open", daemon=True).start()
        return done

    def do(self, steps: Callable[[], Iterator[Rendering]]) -> None:
        """Have threads that render do the steps, and wait for it; it raises what they do."""
        if _renders.get():
            _all_at_once(steps())
            return
        # One of ours, because waiting for it yields to gevent also where threads are not patched.
        answer = ClientQueue(1, "drop_newest")
        self._begin(_Job(self, steps(), lambda error: answer.put_nowait(_Answer(error))))
        error = answer.get().error
        if error is not None:
            raise error

    def _begin(self, job: _Job) -> None:
        try:
            with self._lock:
                self._jobs.add(job)
                self._begin_threads()
            self._queue.put_nowait(job)
        except BaseException:
            self.forget_job(job)
            raise

    def forget_job(self, job: _Job) -> bool:
        """It is done. Gives whether that is news."""
        with self._lock:
            news = job in self._jobs
            self._jobs.discard(job)
            return news

    def end(self) -> None:
        """Tell all who wait for a job that the process ends: its thread may never be ready."""
        with self._lock:
            jobs = list(self._jobs)
        for job in jobs:
            job.finish(_sse_channel.ChannelClosed("the process ends"))

    def give(self, work: _Work) -> None:
        """Have a thread do what one has put off."""
        # At the exit, nobody does anything any more; `end` tells who waits for it.
        with contextlib.suppress(_sse_channel.ChannelClosed):
            self._queue.put_nowait(work)

    def _sweep(self, at_most_every: float = 0.0) -> None:
        now = time.monotonic()
        if now - self._swept < at_most_every:
            return
        self._swept = now
        for identity, rendering in list(self._renderings.items()):
            if rendering.is_forsaken(_LINGER):
                del self._renderings[identity]

    def _work(self) -> None:
        wait = _REST
        surroundings = _Surroundings(self._queue)
        _renders.set(True)
        try:
            while True:
                try:
                    work = self._queue.get(timeout=wait)
                except _sse_channel.ChannelClosed:
                    return
                except Empty:
                    surroundings.leave()
                    wait = _LINGER
                    with self._lock:
                        self._sweep()
                        if not self._renderings:
                            return
                    continue
                wait = _REST
                errors = self.errors
                try:
                    surroundings.enter()
                except BaseException:
                    self.give(work)
                    raise
                try:
                    work.run()
                except Exception:
                    # It is not to end the thread that others are rendered by.
                    _logger.exception("a rendering failed; its clients may miss an event")
                # Not held while it waits for the next: it has a loop, or a stream.
                del work
                if self.errors != errors:
                    # It may have been the database.
                    surroundings.leave()
                with self._lock:
                    self._sweep(at_most_every=_LINGER / 2)
        finally:
            surroundings.leave()
            with self._lock:
                self._threads -= 1
                if (self._renderings or self._jobs) and not self._queue.closed:
                    # It was ended from outside, by what `render` raised, or while a job came.
                    self._begin_threads()


_desks: dict[int, _Desk] = {}


def _desk() -> _Desk:
    """The desk of this process: threads do not survive a fork."""
    pid = os.getpid()
    desk = _desks.get(pid)
    if desk is None:
        # Of two threads that are here at once, both get the same.
        desk = _desks.setdefault(pid, _Desk())
    return desk


def on_threads(steps: Iterator[Rendering]) -> asyncio.Future[None]:
    """Do what takes its time, and may wait for this loop, on threads that render."""
    return _desk().run(steps)


def figures() -> dict[str, int]:
    """How much is rendered in this process."""
    desk = _desks.get(os.getpid())
    return {"renderings": 0, "rendered": 0, "errors": 0} if desk is None else desk.figures()
