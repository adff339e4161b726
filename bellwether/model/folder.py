"""Model folders: where a base model's files are, and whether they are whole, before anything is loaded.

A model is the embedded one, a folder, a GGUF file, or a name on the Hugging Face hub; a file is unpacked and a name
is downloaded, each to a folder in the hub's own place on this machine. Weights are read from safetensors files and
GGUF files only, since a pickle can run code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bellwether.errors import ModelError, first_line
from bellwether.exchange.adapter import CONFIG_FILE, weights_header
from bellwether.model.gguf import is_gguf, unpacked
from bellwether.recipe import recipe

STARTER = Path(__file__).parent / "starter"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"

_LARGEST_HEADER = 100_000_000  # bytes, as safetensors itself has it
_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py"]
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "*.tiktoken")


@dataclass(frozen=True)
class ModelFolder:
    """A model's files on this machine.

    Args:
        name: what a person calls the model, and PEFT finds it by: a hub name or an absolute folder.
        path: the folder that holds its files.
        config: the content of ``config.json``.
        remark: a sentence on where they come from, for whoever trains with them; empty where there is nothing to say.
    """

    name: str
    path: Path
    config: Mapping[str, Any]
    remark: str = ""


def find_folder(settings: recipe.Model) -> ModelFolder:
    """Find a model's folder, downloading a hub model's files but its weights where they are not cached.

    Args:
        settings: path or name, and revision.

    Raises:
        ModelError: there is no such model, its ``config.json`` is missing or broken, an adapter lies beside it, or it
            is a GGUF file that cannot be unpacked.
    """
    if settings.path == "starter":
        return _local(STARTER, settings)
    path = Path(settings.path).expanduser()
    if path.is_dir():
        return _local(path, settings)
    if path.is_file() and is_gguf(path):
        return _of_gguf(path, settings)
    if path.exists():
        raise ModelError(f"model.path is {settings.path!r}, which is a file; give the folder that holds config.json.")
    if is_gguf(path):
        raise ModelError(
            f"model.path is {settings.path!r}, but there is no such file; give a GGUF file on this machine."
        )
    if not _HUB_NAME.match(settings.path):
        raise ModelError(f"model.path is {settings.path!r}, but there is no such folder; give a model's folder.")
    return _model_folder(settings.path, _download(settings, weights=False))


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a model's file.

    Raises:
        ModelError: the file is missing, not UTF-8, not JSON, or no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{path.parent} holds no {path.name}; give a folder with a model in Hugging Face format."
        ) from None
    except json.JSONDecodeError as error:
        raise ModelError(
            f"{path}:{error.lineno}: this is not JSON ({error.msg}); repair the model's folder."
        ) from error
    # Other errors than these two: not UTF-8, a number of thousands of digits, thousands of brackets.
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: the file cannot be read ({error}); repair the model's folder.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: a JSON object was expected, but this is {type(value).__name__}.")
    return value


def weight_files(folder: ModelFolder, settings: recipe.Model) -> dict[str, int]:
    """Return a model's weight files with their sizes in bytes, after checking that they are whole.

    Weights of a hub model that are not on this machine are listed as the hub states them.

    Raises:
        ModelError: there are only pickles, none at all, or one is missing or cut off.
    """
    path = folder.path
    names = _listed_weights(path)
    hub = folder.name == settings.path and on_hub(settings)
    # The list of shards is a small file, which is here before they are.
    if hub and not all((path / name).exists() for name in names):
        return _sizes_on_hub(settings)
    if names:
        return {name: _whole_size(path / name) for name in names}
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        raise ModelError(
            f"{path} has its weights in {pickles[0]}, a format that can run code when it is read; "
            f"save the model as {WEIGHTS} (save_pretrained does so)."
        )
    if on_hub(settings):
        return _sizes_on_hub(settings)
    raise ModelError(f"{path} holds no weights; there has to be {WEIGHTS}, or its shards with {WEIGHTS_INDEX}.")


def with_weights(folder: ModelFolder, settings: recipe.Model) -> ModelFolder:
    """Return a model's folder with whole weights in it; a hub model's are downloaded where they are not cached.

    Raises:
        ModelError: there are none, or they are not whole.
    """
    if on_hub(settings):
        folder = replace(folder, path=_download(settings, weights=True))
    weight_files(folder, settings)
    return folder


def stored_shapes(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return file and shape of each tensor in a folder's weight files, by name; nothing where they are not here.

    Raises:
        ModelError: a header cannot be read.
    """
    names = _listed_weights(path)
    if not all((path / name).is_file() for name in names):
        return {}
    return {
        tensor: (name, tuple(entry["shape"])) for name in names for tensor, entry in _header(path / name)[0].items()
    }


def stored_dtype(folder: ModelFolder, settings: recipe.Model) -> str:
    """Return the precision of a model's weight files: float32, bfloat16 or float16; of mixed ones float32.

    Raises:
        ModelError: as ``weight_files``.
    """
    names = {"BF16": "bfloat16", "F16": "float16"}
    headers = (_header(folder.path / name)[0] for name in weight_files(folder, settings))
    kinds = {str(entry["dtype"]) for header in headers for entry in header.values()}
    return names.get(kinds.pop(), "float32") if len(kinds) == 1 else "float32"


def weights_digest(folder: ModelFolder, settings: recipe.Model) -> str:
    """Return the SHA-256 of a model's weight files, as 64 hexadecimal digits.

    Raises:
        ModelError: as ``with_weights``.
    """
    digest = hashlib.sha256()
    folder = with_weights(folder, settings)
    for name in _listed_weights(folder.path):
        with (folder.path / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def stored_weights(folder: ModelFolder, settings: recipe.Model) -> Iterator[tuple[str, Any]]:
    """Yield the names and torch tensors in a model's weight files, one after another."""
    from safetensors import safe_open

    for name in weight_files(folder, settings):
        with safe_open(folder.path / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - it is no mapping
                yield key, file.get_tensor(key)


def check_tokenizer_files(folder: ModelFolder) -> None:
    """Check that a folder holds a tokenizer at all, since an empty one would be made up otherwise.

    Raises:
        ModelError: it holds none of the usual files.
    """
    if not any(next(folder.path.glob(pattern), None) for pattern in _TOKENIZER_FILES):
        raise ModelError(f"{folder.path} holds no tokenizer; save it there (tokenizer.json) beside the model.")


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep the loader's progress bars and reports off the terminal; problems are raised instead."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _local(path: Path, settings: recipe.Model) -> ModelFolder:
    if settings.revision is not None:
        raise ModelError(
            f"model.revision is {settings.revision!r}, but model.path {settings.path!r} is a folder, which has none; "
            "leave model.revision out."
        )
    if not path.is_dir():
        raise ModelError(f"The embedded model is missing from this installation ({path}); install bellwether again.")
    return _model_folder(str(path.resolve()), path)


def _of_gguf(path: Path, settings: recipe.Model) -> ModelFolder:
    with quiet_transformers():
        folder = _local(unpacked(path), settings)
    return replace(
        folder,
        remark=f"{path.name} is unpacked to float32 in {folder.path}, which is the adapter's base; what few bits had "
        "rounded off when the file was made stays lost.",
    )


def _model_folder(name: str, path: Path) -> ModelFolder:
    """Return the facts of a folder without an adapter, which transformers would add to the base unasked."""
    if (path / CONFIG_FILE).exists():
        raise ModelError(
            f"{path} holds an adapter ({CONFIG_FILE}), but a base model without one is wanted; "
            "merge it first with bellwether export, or remove it."
        )
    files = sorted(path.glob("*.gguf"))
    if files and not (path / "config.json").exists():
        raise ModelError(f"{path} holds no config.json, but a GGUF file; give the file itself: {files[0]}.")
    return ModelFolder(name, path, read_json(path / "config.json"))


def on_hub(settings: recipe.Model) -> bool:
    """Return whether a model is a name on the hub rather than the embedded one, a folder or a file."""
    return settings.path != "starter" and not Path(settings.path).expanduser().exists()


def _download(settings: recipe.Model, weights: bool) -> Path:
    """Return the cached folder of a hub model, downloading what is missing."""
    from huggingface_hub import snapshot_download

    patterns = [*SMALL_FILES, "*.safetensors"] if weights else SMALL_FILES
    try:
        return Path(snapshot_download(settings.path, revision=settings.revision, allow_patterns=patterns))
    # The hub's client raises errors of several libraries: no network, no such name, no access.
    except Exception as error:
        raise ModelError(_unavailable(settings, error)) from error


def _sizes_on_hub(settings: recipe.Model) -> dict[str, int]:
    """Return the sizes of a hub model's weight files without downloading them."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(settings.path, revision=settings.revision, files_metadata=True)
    # As above: errors of several libraries.
    except Exception as error:
        raise ModelError(_unavailable(settings, error)) from error
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or [] if file.rfilename.endswith(".safetensors")}
    if not sizes:
        raise ModelError(f"The hub model {settings.path} has no safetensors weights; others are not read.")
    return sizes


def _unavailable(settings: recipe.Model, error: Exception) -> str:
    """Return the sentence for a model that is neither here nor to be had."""
    reason = first_line(error)
    revision = f" at revision {settings.revision}" if settings.revision else ""
    return (
        f"There is no folder {settings.path!r}, and no model of that name{revision} could be had from the "
        f"Hugging Face hub ({reason}); give the path of a model's folder, or check name and network."
    )


def _listed_weights(path: Path) -> list[str]:
    """Return the names of a folder's safetensors files as its index lists them, or the single one."""
    if (path / WEIGHTS_INDEX).is_file():
        mapping = read_json(path / WEIGHTS_INDEX).get("weight_map")
        if not isinstance(mapping, dict) or not mapping:
            raise ModelError(f"{path / WEIGHTS_INDEX}: weight_map is missing; repair the model's folder.")
        return sorted({str(name) for name in mapping.values()})
    return [WEIGHTS] if (path / WEIGHTS).is_file() else []


def _whole_size(path: Path) -> int:
    """Return the size of a safetensors file in bytes, after comparing it with what its header promises."""
    header, before = _header(path)
    size, promised = (
        path.stat().st_size,
        before + max((entry["data_offsets"][1] for entry in header.values()), default=0),
    )
    if promised != size:
        raise ModelError(f"{path} has {size} bytes, but its header promises {promised}; copy the model again.")
    return size


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Return what the header of a safetensors file says of each tensor, and how many bytes come before their values."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= path.stat().st_size - 8:
                raise ValueError("its header is cut off")
            if length > _LARGEST_HEADER:
                raise ValueError("its header is larger than 100 MB")
            header = weights_header(file.read(length))
        header.pop("__metadata__", None)
        if not all(map(_has_sizes, header.values())):
            raise ValueError("its header gives no sizes")
        return header, 8 + length
    except FileNotFoundError:
        raise ModelError(f"{path} is missing, though {WEIGHTS_INDEX} lists it; copy the model again.") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is no whole safetensors file ({error}); copy the model again.") from error


def _has_sizes(entry: Any) -> bool:
    """Return whether an entry of a header says where a tensor ends, and its shape, in numbers that a file can have."""
    offsets, shape = (entry.get("data_offsets"), entry.get("shape")) if isinstance(entry, dict) else (None, None)
    if not isinstance(offsets, list) or not isinstance(shape, list) or len(offsets) != 2:
        return False
    return all(type(number) is int and 0 <= number < 2**63 for number in [*offsets, *shape])
