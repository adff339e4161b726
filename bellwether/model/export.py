"""Export: an adapter merged into its base as a plain Hugging Face model folder, or beside the base's tokenizer.

    bellwether export runs/default-1 merged
    bellwether export runs/default-1 adapter --adapter

A merged weight is W + scaling · B A (Hu et al. 2021, arXiv 2106.09685, section 4.1), summed in float32
and rounded once to the precision of the base's files. W is the float weight of the base's folder, also where the
adapter was tuned in another precision or over a quantised base.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bellwether.errors import CheckpointError, ModelError
from bellwether.exchange.adapter import CONFIG_FILE, Adapter, adapter_files, read_adapter
from bellwether.recipe import recipe
from bellwether.recipe.file import load_recipe
from bellwether.tools.atomic import TEMPORARY, cannot_write, remove

if TYPE_CHECKING:
    from bellwether.model.folder import ModelFolder

# The model writes these itself; weights and their index are never copied.
_WRITTEN = ("config.json", "generation_config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json")


def export(
    folder: Path,
    out: Path,
    model: str | None = None,
    *,
    merge: bool = True,
    chat_template: Callable[[Any], str | Mapping[str, str]] | None = None,
    own: Adapter | None = None,
) -> None:
    """Merge an adapter into its base model and write model and tokenizer; or write adapter and tokenizer.

    Args:
        folder: a finished run's folder, or a folder with an adapter in PEFT's format.
        out: the folder to write, which must not exist or be empty; a new one appears whole or not at all, in one
            that exists ``config.json`` comes last.
        model: path or hub name of the base; None takes the one that run or adapter names.
        merge: whether to merge; else the adapter is written as it is, over the base that ``model`` names.
        chat_template: returns the chat template to write, or several by name, for the base's tokenizer; None leaves
            what the base has.
        own: a client's adapter, which takes the place of the one in the folder, and has no model card.

    Raises:
        ModelError: there is no adapter, or the base cannot be used or does not fit it.
        CheckpointError: the output folder is not empty or cannot be written.
    """
    found, settings = _find(folder, model)
    adapter = found if own is None else own
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not empty; give a new or an empty folder to write to.")
    from bellwether.model.base import open_base
    from bellwether.model.folder import stored_dtype, with_weights

    opened = open_base(settings)
    written = chat_template(opened.tokenizer) if chat_template is not None else None
    with _appearing(out) as temporary:
        if merge:
            source = with_weights(opened.folder, settings)
            settings = settings.model_copy(update={"dtype": stored_dtype(source, settings)})
            _write_merged(source, settings, opened.config, adapter, temporary)
        else:
            source = opened.folder
            _write_adapter(source, settings, opened.config, adapter, temporary)
            card = _card(folder)
            if card is not None and own is None:
                shutil.copyfile(card, temporary / "README.md")
        _copy_small_files(source.path, temporary)
        named = isinstance(opened.tokenizer.chat_template, dict)  # stand in a folder of their own
        if written is None and named:
            written = opened.tokenizer.chat_template
        if written is not None and (named or written != opened.tokenizer.chat_template):
            _write_chat_template(written, temporary)


def _find(folder: Path, model: str | None) -> tuple[Adapter, recipe.Model]:
    """Return the adapter in a folder, and how to load its base."""
    if (folder / "recipe.yaml").is_file():
        runs = sorted(str(path) for path in folder.glob("*/seed-*/run") if (path / "adapter").is_dir())
        if runs:
            such = ", ".join(runs[:3]) + (", ..." if len(runs) > 3 else "")
            raise ModelError(f"{folder} holds no run of its own; of this comparison, give one of {such}.")
        if not (folder / "adapter").is_dir():
            raise ModelError(f"The run in {folder} is not finished; go on with bellwether run --resume {folder}.")
        settings = load_recipe(folder / "recipe.yaml").model
        adapter = read_adapter(folder / "adapter")
    elif (folder / CONFIG_FILE).is_file():
        adapter = read_adapter(folder)
        settings = recipe.Model(path=model or _named_base(folder, adapter))
    else:
        raise ModelError(f"{folder} holds neither a run nor an adapter; give a folder with one of them.")
    if model is not None and model != settings.path:
        settings = settings.model_copy(update={"path": model, "revision": None})
    return adapter, settings.model_copy(update={"device": "cpu", "quantization": "none"})


def _named_base(folder: Path, adapter: Adapter) -> str:
    if not adapter.config.base_model:
        raise ModelError(f"The adapter in {folder} does not name its base model; give it with --model.")
    return adapter.config.base_model


def _write_merged(source: ModelFolder, settings: recipe.Model, config: Any, adapter: Adapter, out: Path) -> None:
    """Write a base with an adapter merged into it."""
    import torch

    from bellwether.model.base import linear_shapes
    from bellwether.model.folder import quiet_transformers
    from bellwether.model.loading import load_weights
    from bellwether.model.lora import LoraLayers

    model = load_weights(source, settings, torch.device("cpu"), config)
    layers = LoraLayers(model, adapter.config)
    layers.load(0, adapter.tensors)
    layers.detach()
    transposed = {shape.path: shape.transposed for shape in linear_shapes(model)}
    with torch.no_grad():
        for path, a_KRI, b_KOR in zip(adapter.config.modules, layers.A, layers.B, strict=True):
            weight = model.get_submodule(path).weight
            delta_OI = adapter.config.scaling * (b_KOR[0] @ a_KRI[0])
            weight.copy_(weight.float() + (delta_OI.T if transposed[path] else delta_OI))
            if not torch.isfinite(weight).all():
                raise ModelError(f"{path} with the adapter in it does not fit into {settings.dtype}; use --adapter.")
    with quiet_transformers():
        model.save_pretrained(out)


def _write_adapter(source: ModelFolder, settings: recipe.Model, config: Any, adapter: Adapter, out: Path) -> None:
    """Write an adapter as it is, after looking whether the base has its modules."""
    from bellwether.model.loading import empty_model
    from bellwether.model.lora import LoraLayers

    LoraLayers(empty_model(source, config, settings), adapter.config).detach()
    named = dataclasses.replace(adapter, config=dataclasses.replace(adapter.config, base_model=source.name))
    for name, content in adapter_files(named).items():
        (out / name).write_bytes(content)


def _card(folder: Path) -> Path | None:
    """Return the model card of a folder's adapter, where it has one."""
    return next((path for path in (folder / "adapter" / "README.md", folder / "README.md") if path.is_file()), None)


def _write_chat_template(written: str | Mapping[str, str], out: Path) -> None:
    """Write chat templates where transformers looks for them first, and take away what stands elsewhere."""
    named = {"default": written} if isinstance(written, str) else written
    for name, source in named.items():
        path = out / "chat_template.jinja" if name == "default" else out / "additional_chat_templates" / f"{name}.jinja"
        path.parent.mkdir(exist_ok=True)
        path.write_text(source, encoding="utf-8")
    (out / "chat_template.json").unlink(missing_ok=True)
    config = out / "tokenizer_config.json"
    if config.is_file():
        fields = json.loads(config.read_text(encoding="utf-8"))
        fields.pop("chat_template", None)
        config.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _copy_small_files(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template and the model's own code as they are."""
    from bellwether.model.folder import SMALL_FILES

    for pattern in SMALL_FILES:
        for path in sorted(source.glob(pattern)):
            if path.name not in _WRITTEN:
                shutil.copyfile(path, target / path.name)


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """Yield a temporary folder whose content takes its place when all is written; ``out`` is absent or empty."""
    from safetensors import SafetensorError

    out = Path(os.path.realpath(out))
    # A folder that exists stays the same one: it may be the current one, or a mounted disk.
    exists = out.is_dir()
    temporary = (out if exists else out.parent) / f"{TEMPORARY}{os.getpid()}-{out.name}"
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        if exists:
            _move_up(temporary)
        else:
            temporary.rename(out)
    except OSError as error:
        raise cannot_write(out, error) from error
    except SafetensorError as error:
        raise CheckpointError(f"{out} cannot be written ({error}); give a folder with space enough.") from error
    finally:
        remove(temporary)


def _move_up(folder: Path) -> None:
    """Move what a folder holds into the one around it, ``config.json`` last: without it, there is no model."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == "config.json"):
        path.rename(folder.parent / path.name)
