"""Stands between a run and a search server, and lets it seem down, slow or broken: the mode stands in a file.

    python benchmarks/faults/proxy.py UPSTREAM_PORT MODE_FILE

Modes: ``ok``, ``slow`` (half a second more an answer), ``garbage`` (a page in place of every answer),
``refuse`` (connections are closed at once).
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PAGE = b"<html>Down for maintenance.</html>"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n%s" % (len(PAGE), PAGE)


def set_mode(file: Path, mode: str) -> None:
    """Change the mode; from the next request on."""
    file.with_suffix(".next").write_text(mode)
    file.with_suffix(".next").replace(file)


@contextmanager
def proxied(where: Path, upstream: int) -> Iterator[tuple[int, Path]]:
    """A proxy in a process of its own: its port and the file of its mode."""
    mode = where / "mode"
    set_mode(mode, "ok")
    command = [sys.executable, __file__, str(upstream), str(mode)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline()), mode
        finally:
            process.kill()


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, mode: Path) -> None:
    """Bytes from one side to the other, held up as the mode says."""
    while data := await reader.read(1 << 16):
        if mode.read_text() == "slow":
            await asyncio.sleep(0.5)
        writer.write(data)
        await writer.drain()
    writer.close()


async def _serve(upstream: int, mode: Path) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        other: asyncio.StreamWriter | None = None
        try:
            if mode.read_text() == "refuse":
                return
            there, other = await asyncio.open_connection("127.0.0.1", upstream)
            back = asyncio.create_task(_pass(there, writer, mode))
            while data := await reader.read(1 << 16):
                match mode.read_text():
                    case "refuse":
                        break
                    case "garbage":
                        writer.write(ANSWER)
                    case _:
                        other.write(data)
            back.cancel()
        except OSError:
            pass  # one side has closed: the other is closed too
        finally:
            for side in (writer, other):
                if side is not None:
                    side.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), Path(sys.argv[2])))
