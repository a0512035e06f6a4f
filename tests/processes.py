"""Python processes that a test tells what to do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

ENDS_WITHIN = 60  # seconds


def publish_as(user: int, bus: str) -> subprocess.CompletedProcess[str]:
    """Publish as another user of the host; what the BusError says, if it comes to one, is printed.

    Only root may.
    """
    code = f"""
        import os
        import sse_channel  # which the other user may not be able to read
        os.setgroups([]); os.setgid({user}); os.setuid({user})
        try:
            sse_channel.SSEChannel("news").publish("x")
        except sse_channel.BusError as error:
            print(error)
    """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "SSE_CHANNEL_BUS": bus},
        capture_output=True,
        text=True,
        timeout=ENDS_WITHIN,
    )


class Process:
    """A Python process with a bus, which does line by line what it is told."""

    LOOP = """
        import sys
        from sse_channel import *
        import queue, os, time, threading
        for line in sys.stdin:
            try:
                code = compile(line, "<test>", "eval")
            except SyntaxError:
                code = compile(line, "<test>", "exec")
            try:
                print(repr(eval(code)), flush=True)
            except Exception as error:
                print(f"{type(error).__name__}: {error}", flush=True)
    """

    def __init__(self, bus: str, begin: str = "", **options: object) -> None:
        environment = {**os.environ, "SSE_CHANNEL_BUS": bus}
        environment.update(options.pop("environment", {}))
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", textwrap.dedent(self.LOOP)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            **options,
        )
        self.pid = self._process.pid
        if begin:
            self(begin)

    def send(self, line: str) -> None:
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def answer(self) -> str:
        return self._process.stdout.readline().removesuffix("\n")

    def __call__(self, line: str) -> str:
        """What the line gives, as `repr` writes it, or the exception."""
        self.send(line)
        return self.answer()

    def kill(self, number: int = signal.SIGKILL) -> None:
        self._process.send_signal(number)

    def end(self) -> int:
        """Let it end by itself; its exit status."""
        self._process.stdin.close()
        return self._process.wait(ENDS_WITHIN)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
