"""A small frozen model that describes rows in place of the tuned one, as FedHDS-Turbo's GPT-2 does.

FedHDS-Turbo: Qin et al. 2024, arXiv 2410.10926. A proxy is a causal language model, whose hidden states are pooled as
the base's are, or a sentence encoder, which gives one vector for a text, pooled as its folder says; all-MiniLM-L6-v2
and its kin were trained for that (Reimers and Gurevych 2019, arXiv 1908.10084, section 3). Since nothing about it
changes, its features are computed once.

Shape legend: N texts, T tokens of the longest text of a batch, D hidden size, F values of a text.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from bellwether.errors import ModelError
from bellwether.exchange.adapter import AdapterConfig
from bellwether.model.base import load_base, weights_fingerprint
from bellwether.model.batch import pack, padded
from bellwether.model.features import TOKENS, Pooling, by_tokens, pooled_states, pooler, state_numbers
from bellwether.model.folder import (
    SMALL_FILES,
    ModelFolder,
    check_tokenizer_files,
    find_folder,
    read_json,
    weight_files,
    weights_digest,
    with_weights,
)
from bellwether.model.kernels import wide
from bellwether.model.loading import empty_model, load_weights, read_config, read_tokenizer, ready_device
from bellwether.model.lora import LoraLayers
from bellwether.recipe import recipe
from bellwether.tools.texts import CHARACTERS_PER_TOKEN, portions

Kind = Literal["causal", "encoder"]
Mode = Literal["cls", "mean", "lasttoken"]
Rows = Sequence[NDArray[np.int64]]
# From token ids to features_NF: pooling, chosen layers and tokens at once as ``pooled_states`` takes them.
Run = Callable[[Rows, Pooling, Sequence[int] | None, int], NDArray[Any]]


@dataclass(frozen=True)
class Pooled:
    """How a sentence encoder's folder says that it makes one vector of a text.

    Args:
        mode: the first token's hidden state, the mean over all, or the last one's.
        unit: whether vectors are scaled to length one.
        longest: tokens of a text at most; None where the folder sets no limit.
        lower: whether texts are put into lower case first.
    """

    mode: Mode = "mean"
    unit: bool = False
    longest: int | None = None
    lower: bool = False


@dataclass(frozen=True)
class Proxy:
    """A loaded proxy.

    Args:
        name: hub name or absolute folder.
        kind: ``causal`` or ``encoder``.
        fingerprint: SHA-256 of its weights, and of the files that say how it reads a text.
        tokenizer: its own.
        longest: tokens of a text at most.
        lower: whether texts are put into lower case first.
        run: makes features of token ids.
    """

    name: str
    kind: Kind
    fingerprint: str
    tokenizer: Any
    longest: int
    lower: bool
    run: Run

    def features(
        self, texts: Sequence[str], *, pooling: Pooling, chosen: Sequence[int] | None = None, tokens: int = TOKENS
    ) -> NDArray[Any]:
        """Return features_NF of texts, in their order; what is longer than ``longest`` is cut at its end.

        Args:
            texts: prompt and response of each row; an empty text stands for one end-of-sequence token.
            pooling: of a causal model, as ``pooled_states`` has it; a sentence encoder pools as its folder says, by the
                mean where it says nothing.
            chosen: numbers of a causal model's hidden states, as ``state_numbers`` takes them.
            tokens: how many tokens run through the model at once.

        Raises:
            ModelError: as ``state_numbers``; layers are chosen of a sentence encoder.
        """
        return self.run(token_ids(self, texts), pooling, chosen, tokens)


def load_proxy(settings: recipe.Model) -> Proxy:
    """Load a proxy, frozen and in evaluation mode, by the folder or hub name in ``settings.path``.

    Raises:
        ModelError: as ``load_base``; the folder states a way to pool that is not known here, or holds a model that
            encodes and decodes.
    """
    with _naming_its_field(settings.path):
        folder = with_weights(find_folder(settings), settings)
        return _causal(folder, settings) if kind_of(folder) == "causal" else _encoder(folder, settings)


def proxy_width(settings: recipe.Model, chosen: Sequence[int] | None) -> int:
    """Return how many features a proxy gives a row, as its folder says, before anything is loaded.

    Args:
        settings: its folder or hub name as ``path``.
        chosen: as in ``Proxy.features``.

    Raises:
        ModelError: there is no such folder or hub name, it does not say what it holds, what it holds cannot be used
            or has no such layers.
    """
    with _naming_its_field(settings.path):
        folder = find_folder(settings)
        config = read_config(folder, settings)
        text_config = config.get_text_config()
        weight_files(folder, settings)
        check_tokenizer_files(folder)
        if kind_of(folder) == "encoder":
            _check_encoder(folder, config)
            _refuse_layers(folder, chosen)
            return int(text_config.hidden_size)
        return len(state_numbers(int(text_config.num_hidden_layers), chosen)) * int(text_config.hidden_size)


def proxy_fingerprint(settings: recipe.Model) -> str:
    """Return the SHA-256 of a proxy's files, before anything is loaded.

    Args:
        settings: its folder or hub name as ``path``.

    Raises:
        ModelError: there is no such folder or hub name, or its weights are not there.
    """
    with _naming_its_field(settings.path):
        folder = find_folder(settings)
        return _whole_fingerprint(weights_digest(folder, settings), folder.path)


def _check_encoder(folder: ModelFolder, config: Any) -> Pooled:
    """Return how an encoder pools, refusing what is no sentence encoder."""
    if config.is_encoder_decoder:
        raise ModelError(f"The proxy {folder.name} encodes and decodes; give a causal model or a sentence encoder.")
    return read_pooled(folder)


def _refuse_layers(folder: ModelFolder, chosen: Sequence[int] | None) -> None:
    if chosen is not None:
        raise ModelError(
            f"selection.layers is {list(chosen)}, but the proxy {folder.name} is a sentence encoder, which gives "
            "one vector of its last layer; set selection.layers to all."
        )


@contextlib.contextmanager
def _naming_its_field(name: str) -> Iterator[None]:
    """Name, in errors raised inside, the field of a recipe that a proxy stands in, which is not a base's."""
    try:
        yield
    except ModelError as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"The proxy {name} brings Python code of its own, which is not run; give another as selection.proxy."
            ) from error
        raise ModelError(str(error).replace("model.path", "selection.proxy")) from error


def kind_of(folder: ModelFolder) -> Kind:
    """Return what a folder holds: a sentence encoder by its modules.json, else what its architecture says.

    Raises:
        ModelError: the configuration names no architecture.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if (folder.path / "modules.json").exists():
        return "encoder"
    named = folder.config.get("architectures")
    if not isinstance(named, list) or not named:
        raise ModelError(
            f"{folder.path / 'config.json'} names no architectures, so it is not known whether this proxy is a causal "
            "model or an encoder; save it with save_pretrained."
        )
    causal = any(name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in named)
    return "causal" if causal or "AutoModelForCausalLM" in folder.config.get("auto_map", {}) else "encoder"


def token_ids(proxy: Proxy, texts: Sequence[str]) -> list[NDArray[np.int64]]:
    """Return the token ids of texts as a proxy takes them, longer ones cut to fit."""
    given = [text[: CHARACTERS_PER_TOKEN * proxy.longest] for text in texts]
    if proxy.lower:
        given = [text.lower() for text in given]
    rows = [
        ids
        for portion in portions([len(text) for text in given])
        for ids in proxy.tokenizer(given[portion], verbose=False)["input_ids"]
    ]
    # A second time, since an encoder's text ends with a token of its own, wherever it is cut.
    for number in [number for number, ids in enumerate(rows) if len(ids) > proxy.longest]:
        rows[number] = proxy.tokenizer(given[number], truncation=True, max_length=proxy.longest)["input_ids"]
    return [np.asarray(ids or [proxy.tokenizer.eos_token_id], np.int64) for ids in rows]


# Causal models ------------------------------------------------------------------------------------


def _causal(folder: ModelFolder, settings: recipe.Model) -> Proxy:
    base = load_base(settings)
    no_adapter = LoraLayers(base.model, AdapterConfig(rank=1, alpha=1, dropout=0.0, modules=()))

    def run(rows: Rows, pooling: Pooling, chosen: Sequence[int] | None, tokens: int) -> NDArray[Any]:
        return pooled_states(base, no_adapter, rows, pooling=pooling, chosen=chosen, tokens=tokens)

    longest = _longest(base.tokenizer, base.facts.max_positions, None)
    identity = _whole_fingerprint(base.fingerprint, folder.path)
    return Proxy(base.name, "causal", identity, base.tokenizer, longest, False, run)


# Sentence encoders --------------------------------------------------------------------------------


def _encoder(folder: ModelFolder, settings: recipe.Model) -> Proxy:
    device, config = ready_device(settings), read_config(folder, settings)
    pooled = _check_encoder(folder, config)
    empty_model(folder, config, settings, encoder=True)
    tokenizer = read_tokenizer(folder, settings, config, int(config.vocab_size))
    model = load_weights(folder, settings, device, config, encoder=True)
    # A task of pretraining's own layer: not run here, and drawn at random where the folder leaves it out.
    if getattr(model, "pooler", None) is not None:
        model.pooler = None

    def run(rows: Rows, pooling: Pooling, chosen: Sequence[int] | None, tokens: int) -> NDArray[Any]:
        _refuse_layers(folder, chosen)
        return _encoded(model, pooled, rows, tokens, device)

    longest = _longest(tokenizer, _positions(model), pooled.longest)
    identity = _whole_fingerprint(weights_fingerprint(model), folder.path)
    return Proxy(folder.name, "encoder", identity, tokenizer, longest, pooled.lower, run)


def read_pooled(folder: ModelFolder) -> Pooled:
    """Return what a folder states in modules.json and the files that it names; the mean where it states nothing.

    Raises:
        ModelError: it states something that is not known here.
    """
    if not (folder.path / "modules.json").exists():
        return Pooled()
    stated = {_last(module["type"]): folder.path / module["path"] for module in _modules(folder.path)}
    unknown = sorted(stated.keys() - {"Transformer", "Pooling", "Normalize"})
    if unknown:
        raise ModelError(
            f"{folder.path / 'modules.json'} names {unknown[0]}, but of a sentence encoder only Transformer, "
            "Pooling and Normalize are known; take another proxy."
        )
    mode = _mode(read_json(stated["Pooling"] / "config.json")) if "Pooling" in stated else "mean"
    options_file = folder.path / "sentence_bert_config.json"
    options = read_json(options_file) if options_file.exists() else {}
    return Pooled(mode, "Normalize" in stated, options.get("max_seq_length"), bool(options.get("do_lower_case")))


def _modules(path: Path) -> list[Mapping[str, str]]:
    try:
        modules = json.loads((path / "modules.json").read_text(encoding="utf-8"))
        return [{"type": str(module["type"]), "path": str(module["path"])} for module in modules]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ModelError(f"{path / 'modules.json'} is no list of modules with type and path ({error}).") from error


def _last(dotted: str) -> str:
    return dotted.rpartition(".")[2]


def _mode(stated: Mapping[str, Any]) -> Mode:
    """Return the one way to pool that a Pooling module states, in its older or newer form."""
    older: dict[str, Mode] = {
        "pooling_mode_cls_token": "cls",
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_lasttoken": "lasttoken",
    }
    flags = [older.get(key, key) for key, value in stated.items() if key.startswith("pooling_mode_") and value is True]
    named = [stated["pooling_mode"]] if "pooling_mode" in stated else flags
    modes = [mode for mode in older.values() if mode in named]
    if len(modes) != 1 or len(named) != 1:
        raise ModelError(
            f"This proxy pools by {' and '.join(map(str, named)) or 'nothing'} (config.json of its Pooling), but known "
            "are cls, mean and lasttoken, one of them; take another proxy."
        )
    return modes[0]


def _encoded(model: Any, pooled: Pooled, rows: Rows, tokens: int, device: torch.device) -> NDArray[Any]:
    """Return the vectors of texts, in their order."""
    features_NF = np.empty((len(rows), model.config.hidden_size), np.float32)
    with torch.no_grad():
        for members in by_tokens([len(ids_T) for ids_T in rows], tokens):
            batch = pack([rows[member] for member in members], device)
            ids_NT, place_M = padded(batch)
            real_NT = torch.zeros_like(ids_NT).view(-1).index_fill_(0, place_M, 1).view_as(ids_NT)
            hidden_NTD = model(input_ids=ids_NT, attention_mask=real_NT).last_hidden_state
            if pooled.mode == "cls":
                vectors_ND = wide(hidden_NTD[:, 0])
            else:
                vectors_ND = pooler(batch, place_M, "mean" if pooled.mode == "mean" else "last")(hidden_NTD)
            if pooled.unit:
                vectors_ND = torch.nn.functional.normalize(vectors_ND, dim=1)
            features_NF[members] = vectors_ND.cpu().numpy()
    return features_NF


# Both ---------------------------------------------------------------------------------------------


def _longest(tokenizer: Any, positions: int | None, stated: int | None) -> int:
    """Return the tokens of a text at most; a tokenizer without a limit states a huge number."""
    return min(limit for limit in (tokenizer.model_max_length, positions, stated) if limit is not None)


def _positions(model: Any) -> int | None:
    """Return the tokens that an encoder has positions for; RoBERTa's begin to count after the padding's number."""
    positions = getattr(model.config, "max_position_embeddings", None)
    embedding = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    padding = getattr(embedding, "padding_idx", None)
    return positions if positions is None or padding is None else int(positions) - int(padding) - 1


def _whole_fingerprint(weights: str, path: Path) -> str:
    """Return the SHA-256 over a model's weights, and the small files that say how it reads and pools a text."""
    digest = hashlib.sha256(weights.encode())
    for file in sorted({file for pattern in SMALL_FILES for file in path.rglob(pattern)}):
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        digest.update(f"|{file.relative_to(path).as_posix()}|{content}".encode())
    return digest.hexdigest()
