"""A client's half of data selection: the centroids that it sends, and the rows that it then trains on.

Both keep files in the client's own folder, which nobody else has, see ``bellwether.store.client_state``; where a
simulation deals the rows out, its report draws what is there.

Shape legend: N rows of the client, R rows of a piece of them, F features, d dimensions of the space, C clusters.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import operator
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bellwether.client.memory import Memory, recall, remember
from bellwether.client.score import row_losses
from bellwether.data.rows import TokenRow
from bellwether.errors import CheckpointError, NotFinite, RoundFailed, first_line
from bellwether.exchange.messages import NOISE, SPACE, Payload, Reply, Survey, SurveyTask, TrainTask
from bellwether.method.select import rules, space
from bellwether.method.select.budget import budget, deal
from bellwether.method.select.cluster import Clusters, cluster, nearest_first
from bellwether.method.select.privacy import own_noise, release, with_noise
from bellwether.model.base import Base
from bellwether.model.features import pooled_states
from bellwether.model.lora import LoraLayers
from bellwether.recipe.recipe import Model, Selection
from bellwether.store.client_state import SELECTED, selected_files, selected_rows
from bellwether.tools.atomic import make_folder, write_atomic
from bellwether.tools.functions import load_function, naming
from bellwether.tools.progress import advance
from bellwether.tools.words import counted

if TYPE_CHECKING:
    from bellwether.model.proxy import Proxy

SCORED_TOGETHER = 16  # rows whose loss is taken in one pass
AT_ONCE = 256  # rows that are projected at once


class Chooser:
    """Answers surveys and chooses rows for the clients of one process.

    Args:
        base: the frozen base model.
        layers: LoRA layers over it; slot 0 is overwritten.
        folders: each client's own folder, by its name; made where it is missing.
        public: rows of public text that the shared projection is fitted on; none draws a random one.
        secret: what noise on centroids is drawn from; None draws it from the seed that the task brings.
    """

    def __init__(
        self,
        base: Base,
        layers: LoraLayers,
        folders: Mapping[str, Path],
        public: Sequence[TokenRow] = (),
        secret: bytes | None = None,
    ) -> None:
        self._base, self._layers, self._secret = base, layers, secret
        self._folders, self._public = folders, public
        self._proxy = functools.cache(self._load_proxy)
        self._projection = functools.cache(self._make_projection)

    def survey(self, client: str, rows: Sequence[TokenRow], task: SurveyTask) -> Reply:
        """Cluster a client's rows, remember the clusters, and reply with those centroids that may leave it.

        Args:
            client: the client's name.
            rows: its training rows.
            task: what it is asked.

        Raises:
            ModelError: the proxy cannot be used.
            CheckpointError: what the client remembers was damaged, or cannot be written.
        """
        start = time.perf_counter()
        try:
            memory = self._fresh(client, rows, task)
        except NotFinite as error:
            return Reply(client, time.perf_counter() - start, failure=first_line(error))
        settings, least = task.selection, task.selection.min_cluster_rows
        advance("clustering rows")
        clusters = cluster(memory.points_Nd, least, settings.min_samples(least), settings.whole_client)
        released_Cd, numbers = _released(clusters, task, self._secret)
        remember(
            self._folders[client], replace(memory, surveyed=task.round, clusters=clusters, released=tuple(numbers))
        )
        survey = Survey(client, task.round, released_Cd.astype(np.float32))
        return Reply(client, time.perf_counter() - start, survey=survey)

    def choose(self, client: str, rows: Sequence[TokenRow], task: TrainTask) -> list[int]:
        """Return the numbers of the rows that a client trains on in a round, rising, and keep them in its folder.

        Args:
            client: the client's name.
            rows: its training rows.
            task: what it is asked; where there was a survey, at least one of the client's clusters was kept.

        Raises:
            RoundFailed: a person's own method failed, or chose what is not there or too much.
            NotFinite: features or losses are not finite.
            ModelError: the proxy cannot be used.
            CheckpointError: what the client remembers was damaged.
        """
        if task.selection.method == "full":
            return list(range(len(rows)))
        chosen = self._chosen(client, rows, task)
        folder = make_folder(self._folders[client] / SELECTED)
        kept = {"round": task.round, "rows": chosen, "places": [rows[number].row.place for number in chosen]}
        write_atomic(folder / f"{task.round:04d}.json", (json.dumps(kept) + "\n").encode())
        return chosen

    def _chosen(self, client: str, rows: Sequence[TokenRow], task: TrainTask) -> list[int]:
        """Return the numbers of the chosen rows."""
        settings = task.selection
        kept = self._kept_clusters(client, rows, task) if settings.surveys else []
        used = self._used(client, task.round) if settings.rotate else Counter[int]()
        kept = [sorted(cluster, key=used.__getitem__) for cluster in kept]
        if settings.method == "hierarchical":
            return deal(kept, budget(len(rows), settings), settings.rows_per_cluster)
        most = budget(len(rows), settings) or len(deal(kept, None, settings.rows_per_cluster))
        generator = task.draws.numpy("selection")
        match settings.method:
            case "random":
                return rules.random_rows(len(rows), most, generator, used)
            case "k_center":
                return rules.k_center(self._fresh(client, rows, task).points_Nd, most, generator)
            case "perplexity":
                return rules.middle_loss(self._losses(rows, task), most)
            case "length":
                return rules.longest(np.array([int(row.response_T.sum()) for row in rows]), most)
        function = load_function(settings.method)
        with naming(f"selection.method {settings.method}", RoundFailed):
            chosen = function(rows, lambda: self._fresh(client, rows, task).points_Nd, most, generator)
            return _checked(chosen, len(rows), most, settings.method)

    def _kept_clusters(self, client: str, rows: Sequence[TokenRow], task: TrainTask) -> list[list[int]]:
        """Return the rows of each cluster that the server kept, nearest to its centroid first."""
        memory = recall(self._folders[client], task.round)
        if (
            memory is None
            or memory.clusters is None
            or memory.surveyed != task.round
            or not self._fits(memory, rows, task)
        ):
            raise RoundFailed(f"{client} remembers no survey of round {task.round}; its folder was changed meanwhile.")
        kept = task.kept or ()
        if not all(0 <= number < len(memory.released) for number in kept):
            raise RoundFailed(
                f"{client} was told to keep {list(kept)} of its {counted(len(memory.released), 'centroid')}."
            )
        numbers = [memory.released[number] for number in kept]
        return [nearest_first(memory.points_Nd, memory.clusters, number) for number in numbers]

    def _used(self, client: str, round: int) -> Counter[int]:
        """Return how often a client has trained on each of its rows before a round."""
        used = Counter[int]()
        for path in selected_files(self._folders[client]):
            try:
                used.update(selected_rows(path) if int(path.stem) < round else ())
            except (OSError, ValueError) as error:
                raise CheckpointError(
                    f"{path} is not as it was written ({first_line(error)}); remove it, and {client} no longer knows "
                    "what it trained on in that round."
                ) from error
        return used

    def _losses(self, rows: Sequence[TokenRow], task: TrainTask) -> NDArray[np.float64]:
        """Return each row's mean cross-entropy per response token under the round's adapter."""
        with self._loaded(task.payload):
            summed = row_losses(self._base, self._layers, rows, SCORED_TOGETHER, "choosing rows by loss")
        tokens = [max(1, int(row.response_T[1:].sum())) for row in rows]
        losses_N: NDArray[np.float64] = np.array(summed, np.float64) / np.array(tokens)
        _require_finite("losses", losses_N)
        return losses_N

    # Features and the space --------------------------------------------------------------------------

    def _fresh(self, client: str, rows: Sequence[TokenRow], task: SurveyTask | TrainTask) -> Memory:
        """Return where a client's rows lie, as remembered while that is fresh enough, or else computed and kept."""
        settings = task.selection
        memory = recall(self._folders[client], task.round)
        if memory is not None and self._fits(memory, rows, task):
            lasts = settings.features == "proxy" or settings.refresh == 0
            if lasts or task.round < memory.computed + settings.refresh:
                return memory
        features_NF = self._features(rows, task)
        _require_finite("features", features_NF)
        points_Nd = self._reduced(client, features_NF, task).astype(np.float32)
        _require_finite("points", points_Nd)
        memory = Memory(self._key(rows, settings, task.draws.seeds[SPACE]), task.round, points_Nd)
        remember(self._folders[client], memory)
        return memory

    def _fits(self, memory: Memory, rows: Sequence[TokenRow], task: SurveyTask | TrainTask) -> bool:
        """Return whether a memory is of these rows, in this space."""
        key = self._key(rows, task.selection, task.draws.seeds[SPACE])
        return memory.key == key and len(memory.points_Nd) == len(rows)

    def _features(self, rows: Sequence[TokenRow], task: SurveyTask | TrainTask) -> NDArray[Any]:
        """Return the hidden states of rows: of the model as it stands now, or of the proxy, which knows no adapter."""
        if task.selection.proxy is not None:
            return self._states(rows, task.selection)
        if task.payload is None:
            raise ValueError("features of the tuned model need the adapter that the task leaves out")
        with self._loaded(task.payload):
            return self._states(rows, task.selection)

    @contextlib.contextmanager
    def _loaded(self, payload: Payload) -> Iterator[None]:
        """Put what a client is sent into slot 0 and into the base, for what happens inside."""
        self._layers.fit(payload.adapter.config)
        self._layers.load(0, payload.adapter.tensors)
        with self._layers.folded(payload.folded):
            yield

    def _states(self, rows: Sequence[TokenRow], settings: Selection) -> NDArray[Any]:
        """Return the hidden states of rows, of the model with whatever stands in its layers, or of the proxy."""
        chosen = None if settings.layers == "all" else settings.layers
        if settings.proxy is not None:
            proxy = self._proxy(settings.proxy)
            return proxy.features([text(row) for row in rows], pooling=settings.pooling, chosen=chosen)
        return pooled_states(
            self._base, self._layers, [row.ids_T for row in rows], pooling=settings.pooling, chosen=chosen
        )

    def _reduced(self, client: str, features_NF: NDArray[Any], task: SurveyTask | TrainTask) -> NDArray[Any]:
        """Return features in the space that the recipe names."""
        settings, width = task.selection, features_NF.shape[1]
        if settings.space == "shared":
            mean_F, projection_Fd = self._projection(settings, task.draws.seeds[SPACE], width)
            # Piece by piece, so that no second array as large as the features is made.
            starts = range(0, max(1, len(features_NF)), AT_ONCE)
            pieces = (_clipped(features_NF[start : start + AT_ONCE] - mean_F, settings) for start in starts)
            return np.concatenate([piece_RF @ projection_Fd for piece_RF in pieces])
        features_NF = _clipped(features_NF, settings)
        if settings.space == "none":
            return features_NF
        seed = task.draws.small_seed("t-SNE")
        return space.per_client_tsne(features_NF, settings.dimensions, seed)

    def _make_projection(self, settings: Selection, seed: int, width: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the mean and the projection that all clients share."""
        if not self._public:
            draw = np.random.default_rng(seed)
            return np.zeros(width, np.float32), space.random_projection(width, settings.dimensions, draw)
        # Of the untuned base, so that the space stays where it is over all rounds.
        with self._layers.disabled():
            return space.fit_projection(self._states(self._public, settings), settings.dimensions)

    def _load_proxy(self, name: str) -> Proxy:
        from bellwether.model.proxy import load_proxy

        proxy: Proxy = load_proxy(Model(path=name, device=str(self._base.device)))
        return proxy

    # Memory ------------------------------------------------------------------------------------------

    def _key(self, rows: Sequence[TokenRow], settings: Selection, seed: int) -> str:
        """Return a hash of all that a client's points depend on, but for the adapter."""
        model = self._base.fingerprint if settings.proxy is None else self._proxy(settings.proxy).fingerprint
        names = ("features", "pooling", "layers", "space", "dimensions", "clip_norm")
        digest = hashlib.sha256(repr((model, seed, [getattr(settings, name) for name in names])).encode())
        for row in (*self._public, *rows):
            digest.update(row.ids_T.tobytes() + text(row).encode("utf-8", "surrogatepass") + b"\0")
        return digest.hexdigest()


def text(row: TokenRow) -> str:
    """Return a row's prompt and response as text without a template, for a proxy that knows none."""
    said = [turn.text for turn in row.row.turns] or [row.row.instruction, row.row.context, row.row.response]
    return "\n\n".join(part for part in said if part)


def _clipped(features_NF: NDArray[Any], settings: Selection) -> NDArray[Any]:
    """Return features no longer than the recipe allows."""
    return features_NF if settings.clip_norm is None else space.clip_rows(features_NF, settings.clip_norm)


def _released(clusters: Clusters, task: SurveyTask, secret: bytes | None) -> tuple[NDArray[np.float64], list[int]]:
    """Return the centroids that leave a client, with the noise that is asked for, and the numbers of their clusters."""
    settings = task.selection
    sizes_C = np.bincount(clusters.labels_N[clusters.labels_N >= 0], minlength=len(clusters.centroids_Cd))
    noise, norm = settings.noise, settings.clip_norm if settings.noise else None
    released_Cd, numbers = release(clusters.centroids_Cd, sizes_C, settings.min_cluster_rows, norm)
    draw = task.draws.numpy(NOISE) if secret is None else own_noise(secret, released_Cd, noise, norm)
    return with_noise(released_Cd, draw, noise, norm), numbers


def _require_finite(what: str, values: NDArray[Any]) -> None:
    """Refuse figures of rows that are not finite, naming none of the rows, since the sentence leaves the client."""
    if not np.isfinite(values).all():
        raise NotFinite(f"the {what} of some of its rows are not finite, so none can be chosen by them")


def _checked(chosen: Any, count: int, budget: int, name: str) -> list[int]:
    """Return what a person's own method chose, rising, refusing what is no set of row numbers or too large a one."""
    if isinstance(chosen, str | bytes | Mapping) or not isinstance(chosen, Iterable):
        raise RoundFailed(f"selection.method {name} returned {type(chosen).__name__}; return row numbers.")
    numbers: list[int] = []
    for number in chosen:
        if isinstance(number, bool | np.bool_) or not hasattr(number, "__index__"):
            raise RoundFailed(f"selection.method {name} returned {number!r} among its rows; return row numbers.")
        numbers.append(operator.index(number))
    wrong = [number for number in numbers if not 0 <= number < count]
    if wrong or len(set(numbers)) < len(numbers) or not 0 < len(numbers) <= budget:
        what = (
            f"row {wrong[0]} of {count}"
            if wrong
            else f"{counted(len(numbers), 'row')}, {len(set(numbers))} of them different"
        )
        raise RoundFailed(
            f"selection.method {name} chose {what}; choose from 1 to {budget} of 0 to {count - 1}, each once."
        )
    return sorted(numbers)
