"""A federation over a slow line that loses packets and is cut: real TCP and TLS between two network namespaces.

Needs root on Linux. A line is a pair of TUN devices, one of them in a namespace of its own where the sites live; a
thread carries packets from one to the other, late, and not all of them.

python -m benchmarks.network
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.federation import over_sites, recipe_of, run_rounds, summary
from benchmarks.machine import describe

HOST, FAR, NETWORK = "10.77.0.1", "10.77.0.2", "bellwether-sites"
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
RESULT = "network"
# Seconds each way, share of packets lost, seconds of a cut in uploads of the second round, seconds of the deadline.
CASES = ((0.0, 0.0, 0, 600), (0.05, 0.02, 0, 600), (0.05, 0.02, 20, 600), (0.05, 0.02, 150, 90))


class Line:
    """A line between this machine and the namespace of the sites.

    Args:
        delay: seconds each way.
        loss: share of packets that are lost.
    """

    def __init__(self, delay: float, loss: float) -> None:
        self._delay, self._loss, self._draw = delay, loss, random.Random(0)
        self._ends: list[int] = []
        self._over = threading.Event()
        self.cut_at: int | None = None  # bytes from the sites after which the line is dead ...
        self.dead = 0.0  # ... for so many seconds
        self.carried = [0, 0]  # bytes to the sites, and from them

    def __enter__(self) -> Line:
        self._ends = [_tun("bw-near"), _tun("bw-far")]
        _ip("netns", "add", NETWORK)
        _ip("link", "set", "bw-far", "netns", NETWORK)
        for where, name, own, other in ((), "bw-near", HOST, FAR), (("-n", NETWORK), "bw-far", FAR, HOST):
            _ip(*where, "addr", "add", own, "peer", other, "dev", name)
            _ip(*where, "link", "set", name, "up")
        _ip("-n", NETWORK, "link", "set", "lo", "up")
        threading.Thread(target=self._carry, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        _ip("netns", "del", NETWORK)
        for end in self._ends:
            os.close(end)

    def _carry(self) -> None:
        """Carry packets until the line is taken away."""
        under_way: list[tuple[float, int, int, bytes]] = []
        number, dead_until = 0, 0.0
        near, far = self._ends
        with contextlib.suppress(OSError, ValueError):  # the devices are gone
            while not self._over.is_set():
                now = time.monotonic()
                while under_way and under_way[0][0] <= now:
                    _, _, end, packet = heapq.heappop(under_way)
                    os.write(end, packet)
                wait = min(under_way[0][0] - now, 0.1) if under_way else 0.1
                for end in select.select([near, far], [], [], wait)[0]:
                    packet, upwards = os.read(end, 65_536), end == far
                    self.carried[upwards] += len(packet)
                    if self.cut_at is not None and self.carried[True] > self.cut_at:
                        self.cut_at, dead_until = None, now + self.dead
                    if now < dead_until or self._draw.random() < self._loss:
                        continue
                    number += 1
                    heapq.heappush(under_way, (now + self._delay, number, near if upwards else far, packet))


def _tun(name: str) -> int:
    end = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    return end


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def over_line(line: Line, sites: int, megabytes: float, rounds: int, deadline: float, cut: float) -> dict[str, Any]:
    """Return what comes of rounds over a line, which is cut for so many seconds in the second one's uploads."""
    recipe = recipe_of(rounds, 0.1)
    with (
        tempfile.TemporaryDirectory() as place,
        over_sites(Path(place), sites, megabytes, recipe, 0.0, deadline, HOST, NETWORK) as (engine, _),
    ):

        def begins(event: Any) -> None:
            if cut and event.round == 2:
                line.cut_at, line.dead = line.carried[True] + int(megabytes * 1e6 / 2), cut

        before = list(line.carried)
        done = run_rounds(engine, recipe, megabytes, sites, begins)
        carried = [after - one for one, after in zip(before, line.carried, strict=True)]
    return {"rounds": [summary(record) for record in done.rounds], "bytes down and up": carried}


def main() -> None:
    """Measure, and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.network", description=__doc__)
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--megabytes", type=float, nargs="+", default=(0.4, 7))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    given = parser.parse_args()
    points = []
    for megabytes in given.megabytes:
        for delay, loss, cut, deadline in CASES:
            with Line(delay, loss) as line:
                point = {"megabytes": megabytes, "delay": delay, "loss": loss, "cut": cut, "deadline": deadline}
                point |= over_line(line, given.sites, megabytes, given.rounds, deadline, cut)
            sys.stderr.write(f"{point}\n")
            points.append(point)
            report.write(given.out, RESULT, describe(False) | {"sites": given.sites, "points": points})


if __name__ == "__main__":
    main()
