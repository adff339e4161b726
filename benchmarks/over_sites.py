"""What was measured of federations over sites, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.markdown import Measured, table, where

BROKEN = (
    "Where Flower ended its own run, or ended no round in four minutes, its server's last error stands instead: it "
    "keeps its state in SQLite as bellwether's does, and waits less long for the lock. "
)
PLAIN = {"flat": "Flower's FedAvg, one array", "tensors": "Flower's FedAvg, 64 tensors"}


def costs(measured: Measured) -> str:
    """Return what a round costs beside training, at so many sites and bytes."""
    points = measured["points"]
    shown = [name for name in PLAIN if any(name in point for point in points)]
    head = ("sites", "MB", "bellwether, s (least to most)", *(f"{PLAIN[name]}, s" for name in shown), "start, s")
    lines = []
    for point in points:
        ours = point["ours"]
        plain = [_plain(point.get(name)) for name in shown]
        row = (_spread(_settled(ours["seconds"])), *plain, f"{ours['start']:.0f}")
        lines.append((str(point["sites"]), f"{point['megabytes']:g}", *row))
    memory = [(str(p["sites"]), f"{p['megabytes']:g}", *_memory(p["ours"]["memory"])) for p in points]
    broken = any("is locked" in point.get(name, {}).get("ended", "") for point in points for name in shown)
    return (
        "### Rounds over sites\n\nWhat a round costs beside training: a client sends back what it got, with noise. "
        "Coordinator and sites are processes of one machine, over TLS on loopback, with a key for each site; MB are "
        "those of the adapter, which goes down to each site and comes up; start is the time until all sites have said "
        f"hello. {measured['rounds']} rounds, the first not counted. {BROKEN if broken else ''}{where(measured)}"
        f"\n\n{table(head, lines)}\n"
        "Memory in MiB, shared pages counted in part; of sites and SuperNodes the median:\n\n"
        f"{table(('sites', 'MB', 'coordinator', 'a site', 'its SuperNode'), memory)}"
    )


def _plain(found: Mapping[str, Any] | None) -> str:
    """Return the seconds of Flower's own rounds, or how many it ended, and why no more."""
    if found is None:
        return ""
    if "ended" in found:
        return f"ended after {len(found['seconds'])}: {found['ended']}"
    return _spread(_settled(found["seconds"]))


def kills(measured: Measured) -> str:
    """Return what comes of a federation of which a fifth is killed in each round."""
    rounds, killed = measured["rounds"], measured["killed"]
    whole = sum(one["failure"] is None for one in rounds)
    lines = [
        (str(number), str(len(names)), f"{one['took part']} of {one['cohort']}", f"{one['seconds']:.0f}")
        for number, (names, one) in enumerate(zip(killed, rounds, strict=True), 1)
    ]
    kinds = zip(("coordinator", "a site", "a SuperNode"), _memory(measured["memory"]), strict=True)
    memory = ", ".join(f"{kind} {size}" for kind, size in kinds)
    return (
        f"### Sites that are killed\n\nIn each of {len(rounds)} rounds a fifth of {rounds[0]['cohort']} sites is "
        f"killed (SIGKILL) in mid-training, which takes 3 s, and begun again; {whole} rounds were completed, in "
        f"{measured['whole']:.0f} s. Memory at the end in MiB: {memory}. {where(measured)}\n\n"
        f"{table(('round', 'killed', 'took part', 'seconds'), lines)}"
    )


def network(measured: Measured) -> str:
    """Return what a line does to a federation that is slow, loses packets, or is cut."""
    lines = []
    for point in measured["points"]:
        line = f"{1000 * point['delay']:g} ms each way, {point['loss']:.0%} lost"
        cut = f"{point['cut']} s in round 2" if point["cut"] else "no"
        parts = [f"{one['took part']} of {one['cohort']}" for one in point["rounds"]]
        seconds = [f"{one['seconds']:.0f}" for one in point["rounds"]]
        lines.append(
            (f"{point['megabytes']:g}", line, cut, str(point["deadline"]), ", ".join(parts), ", ".join(seconds))
        )
    head = ("MB", "line", "cut", "deadline, s", "took part in rounds 1, 2, …", "seconds of rounds 1, 2, …")
    return (
        f"### A line that is slow, loses packets and is cut\n\n{measured['sites']} sites in a network namespace of "
        "their own; a program carries the packets of real TCP and TLS, late and not all of them. The cut begins when "
        f"half of what one site sends has passed. {where(measured)}\n\n{table(head, lines)}"
    )


def simulation(measured: Measured) -> str:
    """Return how long simulated clients take by bellwether's own engines and by Flower's on Ray."""
    ways = measured["ways"].items()
    lines = [(name, *(f"{seconds:.1f}" for seconds in (*way["train"], way["whole"]))) for name, way in ways]
    same = "All end with the same bytes." if measured["same adapter"] else "They do not end with the same bytes."
    return (
        f"### Flower's simulation engine\n\n{measured['clients']} simulated clients, all in each of two rounds, one "
        f"step each, on the embedded base; seconds, with the same code of clients. {same} {where(measured)}\n\n"
        f"{table(('way', 'round 1', 'round 2', 'the whole run'), lines)}"
    )


def secure(measured: Measured) -> str:
    """Return what secure aggregation costs clients, the server and the line, beside the plain mean."""
    lines = [
        (
            str(one["clients"]),
            str(one["gone"]),
            f"{1000 * (one['client_seconds']['AnnounceTask'] + one['client_seconds']['ShareTask']):,.0f}",
            f"{1000 * one['client_seconds']['TrainTask']:,.0f}",
            f"{1000 * one['client_seconds']['UnmaskTask']:,.0f}",
            f"{one['server_seconds']:.2f}",
            f"{one['plain_seconds']:.2f}",
            f"{one['bytes_up'] / (one['clients'] - one['gone']) / 1e6:.2f}",
            f"{one['plain_bytes_up'] / (one['clients'] - one['gone']) / 1e6:.2f}",
            f"{one['bytes_down'] / one['clients'] / 1e3:,.0f}",
        )
        for one in measured["rounds"]
    ]
    head = (
        "clients",
        "gone after they dealt",
        "keys and shares, ms a client",
        "masking, ms a client",
        "opening, ms a client",
        "server, s",
        "plain mean, s",
        "up, MB a client",
        "plain, MB",
        "more down, kB a client",
    )
    error = max(one["largest_error"] for one in measured["rounds"])
    return (
        f"### Secure aggregation\n\nOne round's aggregation of {measured['values']:,} values, without training, all "
        "clients in one process, seconds of the processor; no value of the mean differs from the plain one by more "
        f"than {error:.0e}. "
        f"{where(measured)}\n\n"
        f"{table(head, lines)}"
    )


def _settled(seconds: Sequence[float]) -> Sequence[float]:
    """Return the seconds of all rounds but the first."""
    return seconds[1:]


def _spread(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})"


def _memory(memory: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(f"{memory[kind]:,.0f}" for kind in ("coordinator", "site", "SuperNode"))
