"""The survey before training: features of rows, their reduction, and clustering, beside the released way.

As FedHDS's release has it (Qin et al. 2024, arXiv 2410.10926), written afresh with today's libraries: a batch of one
row, PEFT's adapter, output layer and loss computed, all hidden states handed over, the last token's kept; then a t-SNE
of each client's own. Here: ``bellwether.model.features`` and one projection for all.

Shape legend: N rows, F features of a row, d dimensions of the space.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.rounds import time_ways
from benchmarks.setting import TINY, Setting, make_clients, make_model
from benchmarks.ways import Way
from benchmarks.worker import fresh, peak_memory

if TYPE_CHECKING:
    from benchmarks.setting import Rows

WIDTHS = (128, 256)
RELEASED, OURS, MEAN, BARE = "released", "bellwether", "bellwether, mean", "bare forward pass"
DIMENSIONS = 16
PRODUCTS = 100  # at a go, since one takes less than the clock can tell
POINTS, TINY_POINTS = (5_000, 50_000), (200, 400)
MULTIPLES, TINY_MULTIPLES = (1, 4, 16, 64), (1, 2)


def measure(threads: int, repeats: int, quick: bool) -> dict[str, Any]:
    """Return what was measured, as plain values for a JSON file."""
    settings = [TINY] if quick else [Setting(hidden, clients=4, rows=100, threads=threads) for hidden in WIDTHS]
    return {
        "repeats": repeats,
        "features": [features(setting, repeats) for setting in settings],
        "reduction": [fresh("the reduction", reduction, setting, repeats) for setting in settings],
        "memory": memory(settings[0], TINY_MULTIPLES if quick else MULTIPLES),
        "clustering": [
            {"points": points, "dimensions": DIMENSIONS, **fresh("clustering", clustering, points, threads)}
            for points in (TINY_POINTS if quick else POINTS)
        ],
    }


# Features -----------------------------------------------------------------------------------------


def features(setting: Setting, repeats: int) -> dict[str, Any]:
    """Return seconds of every way to go once through all rows, in turn, in both precisions."""
    with tempfile.TemporaryDirectory() as place:
        folder = fresh("the model", make_model, setting, Path(place))
        rows = time_ways(setting, folder, ways(), repeats)
    kept = ("seconds", "first", "peak")
    return {
        "setting": asdict(setting),
        "rows": setting.clients * setting.rows,
        "tokens": sum(len(row) for some in make_clients(setting).values() for row in some),
        "ways": {name: {key: row[key] for key in kept} for name, row in rows.items()},
    }


def ways() -> dict[str, Way]:
    """Return the ways to make features, each in both precisions."""
    makers = {
        RELEASED: Way("benchmarks.survey:released"),
        OURS: Way("benchmarks.survey:ours", options={"pooling": "last"}),
        MEAN: Way("benchmarks.survey:ours", options={"pooling": "mean"}),
        BARE: Way("benchmarks.survey:bare"),
    }
    return {
        named(name, dtype): replace(way, change={"dtype": dtype})
        for dtype in ("float32", "bfloat16")
        for name, way in makers.items()
    }


def named(way: str, dtype: str) -> str:
    """Return the name of a way in one precision."""
    return f"{way}, {dtype}"


def released(setting: Setting, folder: Path, clients: Rows) -> Callable[[], Any]:
    """Return what makes features as FedHDS's release does: the last token's state of every layer, row by row."""
    import numpy as np
    import torch

    from benchmarks.rivals import load, with_adapter

    model = with_adapter(load(folder).to(getattr(torch, setting.dtype)), setting).eval()

    def survey() -> None:
        with torch.no_grad():
            for rows in clients.values():
                np.stack([_last_states(model, torch.from_numpy(row.ids_T)[None]) for row in rows])

    return survey


def _last_states(model: Any, ids_1T: Any) -> Any:
    """Return the last token's hidden states of all layers, joined."""
    import torch

    whole = torch.ones_like(ids_1T)
    states = model(input_ids=ids_1T, attention_mask=whole, labels=ids_1T, output_hidden_states=True).hidden_states
    return torch.cat([state_1TD[0, -1] for state_1TD in states]).float().numpy()


def ours(setting: Setting, folder: Path, clients: Rows, pooling: Any) -> Callable[[], Any]:
    """Return what makes features as bellwether does, client by client."""
    from bellwether.model.features import pooled_states

    base, layers = _attached(setting, folder)

    def survey() -> None:
        for rows in clients.values():
            pooled_states(base, layers, [row.ids_T for row in rows], pooling=pooling)

    return survey


def bare(setting: Setting, folder: Path, clients: Rows) -> Callable[[], Any]:
    """Return a forward pass and nothing else: transformers' decoder, no adapter, no output layer, nothing pooled.

    Batches are those of bellwether, padded before the clock starts; freed memory is kept, as bellwether keeps it.
    """
    import torch

    from bellwether.model.base import load_base
    from bellwether.model.batch import pack, padded
    from bellwether.model.features import TOKENS, by_tokens
    from bellwether.model.forward import run_padded
    from benchmarks.ours import model_of

    base = load_base(model_of(setting, folder))
    batches = [
        padded(pack([rows[member].ids_T for member in members], base.device))[0]
        for rows in clients.values()
        for members in by_tokens([len(row) for row in rows], TOKENS)
    ]

    def survey() -> None:
        with torch.no_grad():
            for ids_NT in batches:
                run_padded(base.model.get_decoder(), ids_NT)

    return survey


def _attached(setting: Setting, folder: Path) -> tuple[Any, Any]:
    """Return the base and LoRA layers over it that hold an adapter."""
    from bellwether.model.base import load_base
    from bellwether.model.lora import LoraLayers, initial_adapter
    from bellwether.tools.randomness import Randomness
    from benchmarks.ours import lora_of, model_of

    base = load_base(model_of(setting, folder))
    adapter = initial_adapter(base, lora_of(setting), Randomness(0).torch("adapter of a benchmark"))
    layers = LoraLayers(base.model, adapter.config)
    layers.load(0, adapter.tensors)
    return base, layers


# Memory -------------------------------------------------------------------------------------------


def memory(setting: Setting, multiples: Sequence[int]) -> list[dict[str, Any]]:
    """Return the peak memory of one client's features, as its rows grow, each in a process of its own."""
    with tempfile.TemporaryDirectory() as place:
        folder = fresh("the model", make_model, setting, Path(place))
        return [
            {"rows": rows, **fresh(f"features of {rows} rows", features_peak, setting, folder, rows)}
            for rows in (setting.rows * multiple for multiple in multiples)
        ]


def features_peak(setting: Setting, folder: Path, rows: int) -> Mapping[str, int]:
    """Return bytes: this process's peak before and after features were made of so many rows, and those of the features.

    The rows of a client are taken again and again, so that no others are held.
    """
    from bellwether.model.features import pooled_states

    base, layers = _attached(setting, folder)
    given = [row.ids_T for row in make_clients(replace(setting, clients=1))["client-000"]]
    pooled_states(base, layers, given, pooling="last")  # what is set up once
    before = peak_memory()
    features_NF = pooled_states(base, layers, [given[n % len(given)] for n in range(rows)], pooling="last")
    return {"before": before, "peak": peak_memory(), "features": int(features_NF.nbytes)}


# Reduction and clustering -------------------------------------------------------------------------


def reduction(setting: Setting, repeats: int) -> dict[str, Any]:
    """Return seconds of reducing one client's features: by a t-SNE of its own, and by the shared projection."""
    import numpy as np
    from threadpoolctl import threadpool_limits

    from bellwether.method.select.space import per_client_tsne, random_projection
    from bellwether.tools.randomness import Randomness

    generator = Randomness(0).numpy("features of a benchmark")
    features_NF = generator.standard_normal((setting.rows, (setting.layers + 1) * setting.hidden)).astype(np.float32)
    start = time.perf_counter()
    projection_Fd = random_projection(features_NF.shape[1], DIMENSIONS, generator)
    drawing = time.perf_counter() - start

    def tsne() -> float:
        return _seconds(lambda: per_client_tsne(features_NF, 2, 0))

    def product() -> float:
        return _seconds(lambda: [features_NF @ projection_Fd for _ in range(PRODUCTS)]) / PRODUCTS

    with threadpool_limits(setting.threads):
        turns = [(tsne(), product()) for _ in range(repeats + 1)][1:]
    return {
        "hidden": setting.hidden,
        "rows": setting.rows,
        "features": features_NF.shape[1],
        "drawing": drawing,
        "tsne": [seconds for seconds, _ in turns],
        "product": [seconds for _, seconds in turns],
    }


def clustering(points: int, threads: int) -> dict[str, float]:
    """Return the seconds of HDBSCAN over points of 200 clouds: ours, and by the hdbscan package, and how they agree.

    Ours is scikit-learn's. Both are exact, by a k-d tree, with the same number of neighbours.

    Returns:
        ``seconds`` and ``package``, and the adjusted Rand index of the two divisions.
    """
    import hdbscan
    import numpy as np
    from sklearn.metrics import adjusted_rand_score
    from threadpoolctl import threadpool_limits

    from bellwether.method.select.cluster import find_clusters
    from bellwether.tools.randomness import Randomness

    generator = Randomness(0).numpy("points of a benchmark")
    centres = generator.standard_normal((200, DIMENSIONS)) * 4
    cloud = centres[generator.integers(200, size=points)] + generator.standard_normal((points, DIMENSIONS))
    cloud = cloud[np.lexsort(cloud.T[::-1])]  # ties fall as the points are ordered, and ours orders them so
    # Of as many neighbours as clusters have points at least, itself counted: the package does not count it.
    package = hdbscan.HDBSCAN(min_cluster_size=5, min_samples=4, algorithm="prims_kdtree")
    find_clusters(cloud[:50], 5)  # imports what it needs
    found: dict[str, Any] = {}
    with threadpool_limits(threads):
        seconds = _seconds(lambda: found.update(ours=find_clusters(cloud, 5)[0]))
        theirs = _seconds(lambda: found.update(package=package.fit(cloud).labels_))
    agreement = float(adjusted_rand_score(found["ours"], found["package"]))
    return {"seconds": seconds, "package": theirs, "agreement": agreement}


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def pace(measured: Mapping[str, Any], way: str, dtype: str, other: str, other_dtype: str | None = None) -> float:
    """Return how many times as fast a way is as another one; in the same precision unless another is named."""
    rows = measured["ways"]
    mine, theirs = rows[named(way, dtype)], rows[named(other, other_dtype or dtype)]
    return statistics.median(theirs["seconds"]) / statistics.median(mine["seconds"])
