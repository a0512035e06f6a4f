"""Install a wheel, or a source distribution, into an environment of its own, and use it.

python .ci/smoke.py dist/sse_channel-0.1.0-cp310-abi3-manylinux_2_28_x86_64.whl

A process listens, another publishes one event: the queue and the stream of the first must have it,
over the bus that needs no server. It needs nothing but Python, of the oldest version on.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

USE = """
import json
import subprocess
import sys

from sse_channel import SSEChannel, __version__, stats

channel = SSEChannel("smoke")
q = channel.listen()
with channel.stream() as stream:
    opening = next(stream)
    assert opening.startswith(b"retry: 3000\\nid: "), opening
    published = subprocess.run(
        [sys.executable, "-m", "sse_channel", "publish", "smoke", '{"from": "another process"}'],
        check=True,
        stdout=subprocess.PIPE,
    )
    assert q.get(timeout=30) == {"from": "another process"}
    event_id, data = next(stream).decode().splitlines()[:2]
    assert event_id == "id: " + published.stdout.decode().strip(), event_id
    assert json.loads(data[len("data: "):]) == {"from": "another process"}, data
print(f"sse_channel {__version__}, Python {sys.version.split()[0]}, {stats()['bus']['url']}")
"""


def main() -> None:
    package = Path(sys.argv[1]).resolve(strict=True)
    # Not the platform's own, whose path can be too long for a socket in it.
    with tempfile.TemporaryDirectory(prefix="sse-", dir="/tmp") as directory:
        run(directory, sys.executable, "-m", "venv", "venv")
        python = f"{directory}/venv/bin/python"
        run(directory, python, "-m", "pip", "install", "--quiet", str(package))
        run(directory, python, "-W", "error", "-c", USE)


def run(directory: str, *command: str) -> None:
    # In the directory, or the checkout would be imported in place of what was installed.
    bus = {"SSE_CHANNEL_BUS": f"local://{directory}/bus"}
    subprocess.run(command, check=True, cwd=directory, env={**os.environ, **bus}, timeout=1800)


if __name__ == "__main__":
    main()
