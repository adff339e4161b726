"""GGUF files, as llama.cpp has them: unpacked once by transformers to an ordinary model folder, which is the base.

    model.gguf  →  HF_HOME/bellwether/gguf-<first digits of its SHA-256>/

Weights in few bits become the float32 numbers that these bits stand for, so nothing is lost beyond what was lost when
the file was made. Adapters name the folder as their base, so that PEFT finds it as any other.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bellwether.errors import ModelError, first_line
from bellwether.tools.atomic import TEMPORARY, remove

_MAGIC = b"GGUF"
_PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$", re.IGNORECASE)


def is_gguf(path: Path) -> bool:
    """Return whether a path is named like a GGUF file."""
    return path.suffix.lower() == ".gguf"


def unpacked(path: Path) -> Path:
    """Return the folder that a GGUF file is unpacked to; unpacks it where this has not been done.

    Raises:
        ModelError: it is no whole GGUF file of a model with a tokenizer that transformers' reader takes in full, the
            package gguf is missing, or the folder cannot be written.
    """
    from filelock import FileLock
    from huggingface_hub.constants import HF_HOME
    from safetensors import SafetensorError

    path = path.resolve()
    _check_file(path)
    stat = path.stat()
    folder = Path(HF_HOME) / "bellwether" / f"gguf-{_digest(path, stat.st_size, stat.st_mtime_ns)[:16]}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                if sys.stderr.isatty():  # as the hub's client shows what it downloads
                    print(f"Unpacking {path.name}, once.", file=sys.stderr)
                with _appearing(folder) as temporary, tempfile.TemporaryDirectory() as alone:
                    link = Path(alone) / path.name  # else transformers would read an adapter that lies beside it
                    link.symlink_to(path)
                    _unpack(path, link, temporary)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{path} cannot be unpacked to {folder} ({first_line(error)}); "
            "set the environment variable HF_HOME to a folder with space enough."
        ) from error
    return folder


@functools.cache
def _digest(path: Path, size: int, changed: int) -> str:
    """Return the SHA-256 of a file of this size and time of its last change."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that takes a folder's name when all is written."""
    temporary = folder.with_name(f"{TEMPORARY}{folder.name}")
    remove(temporary)
    try:
        yield temporary
        temporary.rename(folder)
    finally:
        remove(temporary)


def _check_file(path: Path) -> None:
    """Refuse what is seen without reading on: another kind of file, a part of one, a package that is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            f"model.path is {str(path)!r}, a GGUF file, for which the package gguf is not installed: in the clone of "
            "this project, run pip install -e '.[gguf]'."
        )
    with path.open("rb") as file:
        magic = file.read(len(_MAGIC))
    if magic != _MAGIC:
        raise ModelError(f"{path} is no GGUF file: it does not begin with GGUF; give a model's folder or a GGUF file.")
    if part := _PART.search(path.name):
        raise ModelError(
            f"{path} is one of {int(part[1])} parts of a GGUF file, and transformers reads whole ones only; "
            "join them first with llama.cpp's llama-gguf-split --merge."
        )


def _unpack(path: Path, link: Path, folder: Path) -> None:
    """Write model and tokenizer of a GGUF file, to which a folder has nothing but a link, to a new folder."""
    import torch
    import transformers

    reader = _opened(path)
    architecture = _text(reader, "general.architecture", path)
    _check_split(path, reader)
    where: dict[str, Any] = {"gguf_file": link.name, "local_files_only": True}
    try:
        config = transformers.AutoConfig.from_pretrained(link.parent, **where)
    # transformers raises errors of many types for what it does not know.
    except Exception as error:
        raise ModelError(
            f"{path} holds a model of architecture {architecture!r}, which transformers cannot read from a GGUF file "
            f"({first_line(error)}); give the model's folder in Hugging Face format."
        ) from error
    _check_complete(path, reader, config)
    _write_tokenizer(path, link, reader, folder)
    # Some architectures would stay packed where the package kernels is installed; older versions unpack all.
    packed = getattr(transformers, "GgufConfig", None)
    whole = {"quantization_config": packed(dequantize=True)} if packed is not None else {}
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a bar of progress that cannot be turned off
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                link.parent, config=config, dtype=torch.float32, output_loading_info=True, **where, **whole
            )
    except Exception as error:
        raise ModelError(
            f"The weights in {path} cannot be loaded ({first_line(error)}); copy the file again."
        ) from error
    # What is missing was made up, at random.
    missing = sorted([*report["missing_keys"], *(str(entry[0]) for entry in report["mismatched_keys"])])
    if missing:
        raise ModelError(f"{path} lacks the weight {missing[0]}, or has it in another shape; copy the file again.")
    model.save_pretrained(folder)


def _opened(path: Path) -> Any:
    """Return the package's reader of a GGUF file, after looking at one weight of each kind."""
    import gguf

    try:
        reader = gguf.GGUFReader(path)
    # Whatever numpy makes of bytes that are not there or mean something else.
    except Exception as error:
        raise ModelError(
            f"{path} is cut off or damaged ({first_line(error)}), or of a version or a kind of weights that the "
            "package gguf does not know; copy the file again."
        ) from error
    for kind, tensor in {tensor.tensor_type: tensor for tensor in reader.tensors}.items():
        try:
            gguf.dequantize(tensor.data[:1], kind)
        except NotImplementedError as error:
            raise ModelError(
                f"{path} holds weights of kind {kind.name}, which the package gguf cannot unpack; "
                "give a file of another kind."
            ) from error
    if "tokenizer.ggml.tokens" not in reader.fields:
        raise ModelError(f"{path} holds no tokenizer; give a GGUF file of a whole model, or the model's folder.")
    return reader


def _text(reader: Any, key: str, path: Path) -> str:
    """Return a text of a file's metadata."""
    if key not in reader.fields:
        raise ModelError(f"{path} does not say {key}; copy the file again.")
    return str(reader.fields[key].contents())


def _check_complete(path: Path, reader: Any, config: Any) -> None:
    """Refuse a file of which transformers' reader would leave something out, so that it computes something else.

    The numbers in the file are counted against those that the model has places for. Nothing is allocated before.
    """
    import torch
    from transformers import AutoModelForCausalLM

    layers = getattr(config, "num_hidden_layers", 0)
    if layers > len(reader.tensors):
        raise ModelError(f"{path} promises {layers} layers, but holds {len(reader.tensors)} weights; copy it again.")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise ModelError(f"{path} makes no causal language model ({first_line(error)}); give one that is.") from error
    kept = model.state_dict()
    places = sum(one.numel() for one in model.parameters())
    places += sum(one.numel() for name, one in model.named_buffers() if name in kept)
    stored = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors if not _beyond(tensor.name, config)}
    ignored = _ignored(reader, config)
    if sum(stored.values()) > places and not ignored:
        ignored = ["more weights than the model has places for"]
    if ignored:
        raise ModelError(
            f"{path} holds {ignored[0]}, which transformers' reader of GGUF files leaves out, so that the model would "
            "compute something else; give the model's folder in Hugging Face format."
        )


def _beyond(name: str, config: Any) -> bool:
    """Return whether a weight is of no use to the model: a second copy of the embedding, or a layer behind the last."""
    layer = re.match(r"blk\.(\d+)\.", name)
    if layer is not None:
        return int(layer[1]) >= int(config.num_hidden_layers)
    return name == "output.weight" and bool(config.tie_word_embeddings)


def _ignored(reader: Any, config: Any) -> list[str]:
    """Return what a file says of stretched positions, where the configuration has kept nothing of it."""
    rope = getattr(config, "rope_parameters", None) or {}
    flat = rope.values() if rope and all(isinstance(one, Mapping) for one in rope.values()) else [rope]
    if any(one.get("rope_type", "default") != "default" for one in flat):
        return []
    fields = {name: field.contents() for name, field in reader.fields.items() if ".rope.scal" in name}
    said = [name for name, value in fields.items() if value not in ("none", 1, 1.0, False)]
    return [*(tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_")), *said]


def _check_split(path: Path, reader: Any) -> None:
    """Refuse a byte-level tokenizer that splits texts in a way that transformers' reader does not know.

    It would split them as GPT-2's does, and make other tokens of them than the model has learnt.
    """
    if _text(reader, "tokenizer.ggml.model", path) != "gpt2":
        return
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as known
    except ImportError:  # of another version
        known = {}
    key = "tokenizer.ggml.pre"
    way = str(reader.fields[key].contents()) if key in reader.fields else None
    if way != "gpt-2" and way not in known:
        said = f"that its tokenizer splits texts as {way!r}" if way is not None else "how its tokenizer splits texts"
        raise ModelError(
            f"{path} {'says' if way is not None else 'does not say'} {said}, which transformers' reader of GGUF files "
            "does not know, so that texts would become other tokens; give the model's folder in Hugging Face format."
        )


def _write_tokenizer(path: Path, link: Path, reader: Any, folder: Path) -> None:
    """Write a file's tokenizer to a folder, without tokens that transformers made up behind the file's own."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(link.parent, gguf_file=link.name, local_files_only=True)
    # Tokenizers of different families fail with errors of many types.
    except Exception as error:
        raise ModelError(
            f"The tokenizer in {path} cannot be read ({first_line(error)}); "
            "give the model's folder in Hugging Face format."
        ) from error
    tokenizer.save_pretrained(folder)
    known = len(reader.fields["tokenizer.ggml.tokens"].data)
    written = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    written["added_tokens"] = _of_the_file(written["added_tokens"], known)
    (folder / "tokenizer.json").write_text(json.dumps(written, ensure_ascii=False), encoding="utf-8")


def _of_the_file(added: Sequence[Mapping[str, Any]], known: int) -> list[Mapping[str, Any]]:
    return [token for token in added if token["id"] < known]
