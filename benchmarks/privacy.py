"""Promises of differential privacy beside other accountants, and the largest change that one client can make.

    python -m benchmarks.privacy                 epsilons at ten settings, and 10,000 random cohorts
    python -m benchmarks.privacy --cohorts 100   the same with fewer

Epsilons are bellwether's, dp-accounting's by a call of its own, and Opacus's where that is installed (``pip install
--no-deps opacus opt-einsum``): its RDP, and PRV (Gopi et al. 2021, arXiv 2106.02848), which it states with its own
error of 0.01 added. It prints tables and writes ``benchmarks/results/privacy.json``.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from bellwether.exchange.adapter import Adapter, AdapterConfig, key_a, key_b
from bellwether.exchange.messages import Update
from bellwether.method.accounting import Release, epsilon
from bellwether.method.average import fedavg
from bellwether.method.method import Known, Trained, mean_of
from bellwether.method.private import SLACK, Noise, client_level
from bellwether.recipe.privacy import Privacy
from bellwether.tools.atomic import write_atomic
from bellwether.tools.randomness import Draws
from benchmarks.machine import describe

# Noise multiplier, sums, sampling rate, delta.
SETTINGS = (
    (1.0, 20, 0.1, 1e-3),
    (1.0, 100, 0.1, 1e-5),
    (0.8, 500, 0.05, 1e-5),
    (0.6, 1000, 0.01, 1e-6),
    (2.0, 20, 0.5, 1e-5),
    (1.5, 200, 0.02, 1e-6),
    (1.0, 1, 1.0, 1e-5),
    (2.7, 20, 1.0, 1e-5),
    (5.0, 20, 1.0, 1e-5),
    (10.0, 100, 1.0, 1e-6),
)
CLIP = 0.5
PARAMETERS = 512


def epsilons(noise: float, times: int, rate: float, delta: float) -> dict[str, Any]:
    """Return a setting, and its epsilon by every accountant that is there."""
    release = Release(noise, times, rate)
    return {
        "noise": noise,
        "times": times,
        "rate": rate,
        "delta": delta,
        "PLD": epsilon(release, delta),
        "dp-accounting PLD": _library("pld", noise, times, rate, delta),
        "RDP": epsilon(release, delta, accountant="rdp"),
        "dp-accounting RDP": _library("rdp", noise, times, rate, delta),
        **_opacus(noise, times, rate, delta),
    }


def _library(kind: str, noise: float, times: int, rate: float, delta: float) -> float:
    import dp_accounting as dp
    from dp_accounting import pld, rdp

    made = pld.PLDAccountant() if kind == "pld" else rdp.RdpAccountant()
    made.compose(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(noise)), times)
    return float(made.get_epsilon(delta))


def _opacus(noise: float, times: int, rate: float, delta: float) -> dict[str, float]:
    try:
        from opacus.accountants import PRVAccountant, RDPAccountant
    except ImportError:
        return {}
    found = {}
    for name, kind in (("Opacus PRV", PRVAccountant), ("Opacus RDP", RDPAccountant)):
        made = kind()
        made.history = [(noise, rate, times)]
        found[name] = float(made.get_epsilon(delta))
    return found


def largest_change(cohorts: int, seed: int) -> dict[str, float]:
    """Return the largest change of a round's sum by any one client, over random cohorts, and what is stated.

    Clients send changes of all lengths, from far below the clipping norm to far above it, in float32.
    """
    draw = np.random.default_rng(seed)
    config = AdapterConfig(1, 1.0, 0.0, ("m",))
    privacy = Privacy(noise=1.0, clip_norm=CLIP)
    method = client_level(fedavg(), privacy, Noise(1e-12, 1.0, lambda closing: b"the same"))
    largest = 0.0
    for _ in range(cohorts):
        half = PARAMETERS // 2
        tensors = {key_a("m"): draw.normal(size=(1, half)), key_b("m"): draw.normal(size=(half, 1))}
        adapter = Adapter(config, {key: value.astype(np.float32) for key, value in tensors.items()})
        state = method.begin(adapter)
        payload = method.give(state, Known("", 1), 1)
        updates = []
        for number in range(int(draw.integers(1, 9))):
            size = 10.0 ** draw.uniform(-4, 4)
            last = {
                key: (value + size * draw.standard_cauchy(value.shape)).astype(np.float32)
                for key, value in adapter.tensors.items()
            }
            sent = method.finish(Trained(payload, {}, [last], [0.1], Draws({})))
            updates.append(Update(f"{number}", 1, sent.tensors, 1))
        start = np.concatenate([value.reshape(-1) for value in adapter.tensors.values()]).astype(np.float64)
        for left_out in range(len(updates)):
            sums = []
            for some in (updates, updates[:left_out] + updates[left_out + 1 :]):
                mean = mean_of(some, method.weigh) if some else None
                total = np.zeros(PARAMETERS)
                if mean is not None:
                    total = (np.concatenate([mean.tensors[key].reshape(-1) for key in adapter.tensors]) - start) * len(
                        some
                    )
                sums.append(total)
            largest = max(largest, float(np.linalg.norm(sums[0] - sums[1])))
    return {"cohorts": cohorts, "largest": largest, "stated": CLIP * (1 + SLACK), "clip": CLIP}


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.privacy", description="Promises beside other bounds.")
    parser.add_argument("--cohorts", type=int, default=10_000)
    parser.add_argument("--settings", type=int, default=len(SETTINGS), help="how many of the settings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args(arguments)
    found = {
        **describe(given.cohorts < 10_000 or given.settings < len(SETTINGS)),
        "epsilons": [epsilons(*setting) for setting in SETTINGS[: given.settings]],
        "change": largest_change(given.cohorts, given.seed),
    }
    for row in found["epsilons"]:
        print(" | ".join(f"{name} {value:.6g}" for name, value in row.items()))
    off = max(abs(row[ours] / row[f"dp-accounting {ours}"] - 1) for row in found["epsilons"] for ours in ("PLD", "RDP"))
    print(f"largest difference from the library's own call: {off:.2%}")
    change = found["change"]
    print(
        f"largest change of a sum by one client over {change['cohorts']:,} cohorts: {change['largest']:.9f}, stated "
        f"{change['stated']:.9f}"
    )
    assert math.isfinite(off)
    write_atomic(given.out / "privacy.json", (json.dumps(found, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
