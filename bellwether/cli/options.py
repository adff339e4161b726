"""What commands have in common on the command line: arguments and flags, and the fields of a recipe that flags set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from bellwether.errors import RecipeError

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE] [FIELD=VALUE]...",
        help="A YAML file or the name of a shipped recipe, and dotted fields to set, such as training.batch_size=4.",
        show_default=False,
    ),
]
ModelFlag = Annotated[str | None, typer.Option("--model", help="Base model: folder, GGUF file, hub name, or starter.")]
DataFlag = Annotated[
    list[str] | None, typer.Option("--data", help="File, folder or hub name with rows; may be given several times.")
]
SeedFlag = Annotated[int | None, typer.Option("--seed", help="The number that all draws derive from.")]
RoundsFlag = Annotated[int | None, typer.Option("--rounds", help="Number of rounds.")]
OutFlag = Annotated[
    Path | None,
    typer.Option("--out", help="Folder for the results; else runs/NAME-N, and comparison for a comparison."),
]
ResumeFlag = Annotated[Path | None, typer.Option("--resume", help="Folder of what was begun, to go on with it.")]
JobsFlag = Annotated[
    int | None,
    typer.Option(
        "--jobs",
        min=1,
        help="Processes side by side, each on its share of cores: clients of a run, arms of a comparison.",
    ),
]
DeviceFlag = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")]
TrustFlag = Annotated[
    bool, typer.Option("--trust-code", help="Run Python code that a file or folder names, without asking.")
]

TalkFolder = Annotated[Path, typer.Argument(help="Folder of a run, a comparison, an adapter or a model.")]
TalkSeed = Annotated[int | None, typer.Option("--seed", help="Of a comparison: whose adapters; else the first seed's.")]

# Fields of the recipe that other rows by --data empty, unless the command line sets them itself.
CLEARED = ("data.test_sources=[]", "data.validation_sources=[]")


def fields_of_flags(
    model: str | None = None,
    data: list[str] | None = None,
    rounds: int | None = None,
    seed: int | None = None,
    device: str | None = None,
    out: Path | None = None,
    jobs: int | None = None,
) -> list[str]:
    """Return the fields that flags set, as a person would write them."""
    given: dict[str, Any] = {
        "model.path": model,
        "federation.rounds": rounds,
        "seed": seed,
        "model.device": device,
        "output.folder": str(out) if out else None,
        "engine.processes": jobs,
    }
    fields = [f"{field}={_quoted(value)}" for field, value in given.items() if value is not None]
    if data:
        # Other rows bring no test rows along: those of the recipe would be rows of another data set.
        fields += [f"data.sources=[{', '.join(map(_quoted, data))}]", *CLEARED]
    return fields


def fields_of_reading(encoding: str | None, delimiter: str | None, skip_bad_rows: bool) -> list[str]:
    """Return the fields that the flags of ``init`` set, as a person would write them."""
    given = {"data.encoding": encoding, "data.delimiter": delimiter, "data.skip_bad_rows": skip_bad_rows}
    return [f"{field}={_quoted(value)}" for field, value in given.items() if value is not None]


def _quoted(value: Any) -> str:
    """Return a value as YAML in one line."""
    return json.dumps(value)


def check_folder_flags(out: Path | None, resume: Path | None) -> None:
    """Refuse to go on with one folder in another.

    Raises:
        RecipeError: both are given.
    """
    if resume is not None and out is not None:
        raise RecipeError("command line: what was begun goes on in its own folder; give --resume or --out, not both.")
