"""Export of a run: its adapter, with the chat template that renders prompts as it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bellwether.data.chat_template import trained_template
from bellwether.data.prompts import resolve_template
from bellwether.exchange.adapter import Adapter
from bellwether.model.export import export
from bellwether.recipe.file import load_recipe
from bellwether.store.checkpoint import RECIPE


def export_run(
    folder: Path, out: Path, model: str | None = None, *, merge: bool = True, own: Adapter | None = None
) -> None:
    """Write what a run tuned, merged into its base or beside the base's tokenizer.

    Args:
        folder: a finished run's folder, or a folder with an adapter alone, which does not say how its prompts were
            rendered: the base's own chat template stays.
        out: the folder to write; it must not exist or be empty.
        model: path or hub name of the base; None takes the one that run or adapter names.
        merge: whether the adapter is merged into the base.
        own: what one of the run's clients serves, in the place of what all share.

    Raises:
        BellwetherError: as ``model.export.export``; or no chat template can render what was trained.
    """
    if not (folder / RECIPE).is_file():
        export(folder, out, model, merge=merge, own=own)
        return
    data = load_recipe(folder / RECIPE).data

    def template_of(tokenizer: Any) -> str | Mapping[str, str]:
        return trained_template(resolve_template(data, tokenizer), tokenizer)

    export(folder, out, model, merge=merge, chat_template=template_of, own=own)
