"""The command ``bellwether``: reads the command line, and turns errors into one sentence and an exit code.

Exit codes: 0 done; 1 the run itself failed, such as a round below its quorum or a judge that is away; 2 something in
the command, recipe, data or model must be changed; 130 interrupted.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from bellwether import __version__
from bellwether.errors import BellwetherError, CheckpointError, JudgeAway, RecipeError, RoundFailed
from bellwether.recipe.file import dump_recipe, find_recipe, load_recipe, shipped
from bellwether.recipe.recipe import Recipe

app = typer.Typer(
    name="bellwether",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE] [FIELD=VALUE]...",
        help="A YAML file or the name of a shipped recipe, and dotted fields to set, such as training.batch_size=4.",
        show_default=False,
    ),
]
ModelFlag = Annotated[str | None, typer.Option("--model", help="Base model: folder, hub name, or starter.")]
DataFlag = Annotated[
    list[str] | None, typer.Option("--data", help="File, folder or hub name with rows; may be given several times.")
]
SeedFlag = Annotated[int | None, typer.Option("--seed", help="The number that all draws derive from.")]
RoundsFlag = Annotated[int | None, typer.Option("--rounds", help="Number of rounds.")]
DeviceFlag = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")]

TalkFolder = Annotated[Path, typer.Argument(help="Folder of a run, a comparison, an adapter or a model.")]
TalkSeed = Annotated[int | None, typer.Option("--seed", help="Of a comparison: whose adapters; else the first seed's.")]

LOCAL = "127.0.0.1"
INTERRUPTED = 130
_GO_ON = "if rounds were committed, go on with --resume FOLDER."
# What is said after an interrupt, of commands that are not resumed so.
_AFTERWARDS = {
    "compare": "finished arms are kept, and the same command goes on with the others.",
    "judge": "answers and verdicts are kept, and the same command goes on with the others.",
    "chat": "what was answered was shown.",
    "ui": "the page was not opened.",
}

# Fields of the recipe that other rows by --data empty, unless the command line sets them itself.
_CLEARED = ("data.test_sources=[]", "data.validation_sources=[]")

# A rate that suits pretrained models of usual size; the default recipe's suits the embedded base only.
USUAL_RATE = 3e-4


def _show_version(wanted: bool) -> None:
    """Print the version and end, where it is asked for."""
    if wanted:
        sys.stdout.write(f"bellwether {__version__}\n")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Federated instruction tuning of language models: the base stays frozen, only LoRA adapters travel."""


@app.command(short_help="Tune a model with simulated clients.")
def run(
    words: Words = None,
    model: ModelFlag = None,
    data: DataFlag = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run folder; else runs/NAME-N.")] = None,
    rounds: RoundsFlag = None,
    seed: SeedFlag = None,
    device: DeviceFlag = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="Run folder to go on with.")] = None,
) -> None:
    """Tune a model with simulated clients, and write adapter, scores and records to a run folder."""
    flags = _flags(model, data, rounds, seed, device, out)
    if resume is not None and out is not None:
        raise RecipeError("command line: a run goes on in its own folder; give --resume or --out, not both.")
    if resume is None:
        _run(_recipe(words, flags), None)
    else:
        _run(_resumed_recipe(resume, words or [], flags), resume)


@app.command(short_help="Compare untuned, alone, centralized and federated.")
def compare(
    words: Words = None,
    model: ModelFlag = None,
    data: DataFlag = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for the results; a comparison in it goes on.")] = Path(
        "comparison"
    ),
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Processes side by side, each on its share of cores.")] = 1,
) -> None:
    """Train the arms that a recipe names on one split, over several seeds, and show how they compare."""
    from bellwether.compare.compare import compare as run_comparison
    from bellwether.report.compare_show import comparison_files, terminal
    from bellwether.report.compare_table import client_gains, make_lines
    from bellwether.tell.narrate import plain_lines
    from bellwether.tools.atomic import write_atomic

    recipe = _recipe(words, _flags(model, data, None, None, None), "default-table")
    comparison = run_comparison(recipe, out, jobs=jobs, watch=plain_lines(_say))
    lines, gains = make_lines(comparison), client_gains(comparison)
    for name, content in comparison_files(lines, gains, comparison).items():
        write_atomic(out / name, content)
    console = _console()
    console.print(terminal(lines, gains, ascii_only=console.options.ascii_only))
    _say(f"Tables and outcomes are in {out}; {out / 'table.md'} has all figures.")
    _report(out)


@app.command(short_help="Say what a run will need.")
def plan(
    words: Words = None,
    model: ModelFlag = None,
    data: DataFlag = None,
    rounds: RoundsFlag = None,
    seed: SeedFlag = None,
    device: DeviceFlag = None,
) -> None:
    """Say what a run will need (parameters, memory, tokens, bytes, time) before anything is loaded."""
    from bellwether.runner.plan import plan as make_plan
    from bellwether.runner.plan import plan_table

    _console().print(plan_table(make_plan(_recipe(words, _flags(model, data, rounds, seed, device)))))


@app.command("data", short_help="Show what each client holds.")
def show_data(
    words: Words = None,
    model: ModelFlag = None,
    data: DataFlag = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for clients.png and clients.svg.")] = Path("."),
    seed: SeedFlag = None,
) -> None:
    """Show what each client holds: a table, and a picture of categories per client."""
    from bellwether.report.holdings import draw, table
    from bellwether.runner.describe import describe
    from bellwether.runner.prepare import prepare
    from bellwether.tools.atomic import make_folder

    prepared = prepare(_recipe(words, _flags(model, data, None, seed, None)))
    description = describe(prepared.federated, prepared.clients)
    _console().print(table(description))
    for text in prepared.notes:
        _say(text)
    make_folder(out)
    for path in draw(description, out):
        _say(f"Wrote {path}.")


@app.command("recipe", short_help="Print a recipe with every field.")
def show_recipe(
    words: Words = None,
    model: ModelFlag = None,
    data: DataFlag = None,
    rounds: RoundsFlag = None,
    seed: SeedFlag = None,
    device: DeviceFlag = None,
    names: Annotated[bool, typer.Option("--list", help="List the shipped recipes instead.")] = False,
) -> None:
    """Print a recipe with every field, its value, unit and meaning."""
    if names:
        sys.stdout.write("".join(f"{name}\n" for name in shipped()))
        return
    sys.stdout.write(dump_recipe(_recipe(words, _flags(model, data, rounds, seed, device)), comments=True))


@app.command(short_help="Write a recipe for your data files.")
def init(
    files: Annotated[list[Path], typer.Argument(help="Your data files, or a folder with one file per client.")],
    out: Annotated[Path, typer.Option("--out", help="Recipe to write.")] = Path("recipe.yaml"),
) -> None:
    """Look at your data files and write a commented recipe for them."""
    from bellwether.runner.init import propose
    from bellwether.tools.atomic import write_atomic

    if out.exists():
        raise RecipeError(f"{out} exists already; remove it, or name another file with --out.")
    text = propose(files)
    write_atomic(out, text.encode())
    _say(f"Wrote {out}. Next: bellwether data {out}, bellwether plan {out}, bellwether run {out}")


@app.command("report", short_help="Write the report on a run or comparison.")
def write_report(
    folder: Annotated[Path, typer.Argument(help="Folder of a finished run or comparison.")],
    out: Annotated[Path | None, typer.Option("--out", help="File to write; else report.html in the folder.")] = None,
) -> None:
    """Write what a finished run or comparison gave as one HTML file, which needs no network and no script."""
    from bellwether.report.report import report

    _say(f"Report: {report(folder, out)}")


@app.command(short_help="Merge an adapter into its base model.")
def export(
    folder: Annotated[Path, typer.Argument(help="Run folder, or a folder with an adapter.")],
    out: Annotated[Path, typer.Argument(help="Folder for the merged model.")],
    model: ModelFlag = None,
) -> None:
    """Merge an adapter into its base model and write a plain Hugging Face model folder."""
    from bellwether.model.export import export as merge

    merge(folder, out, model)
    _say(f"Wrote {out}.")


@app.command("judge", short_help="Let a language model judge two models' answers.")
def judge_answers(
    folder_a: Annotated[
        str, typer.Argument(help="Folder of run, comparison, adapter or model; FOLDER:NAME of several.")
    ],
    folder_b: Annotated[str, typer.Argument(help="The other model, whose sum is divided by the first one's.")],
    questions: Annotated[Path, typer.Option("--questions", help="Vicuna's format, or rows of instructions.")],
    judge: Annotated[str, typer.Option("--judge", help="Name of the judging model at its server.")],
    address: Annotated[str | None, typer.Option("--address", help="URL of its server; else OPENAI_BASE_URL.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for the results; a judgement in it goes on.")] = Path(
        "judgement"
    ),
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Verdicts on each pair in each order.")] = 1,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Questions, of all categories in turn.")] = None,
    category: Annotated[
        list[str] | None, typer.Option("--category", help="Questions of these; may be repeated.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")] = 512,
    temperature: Annotated[float | None, typer.Option("--temperature", min=0, max=2, help="Of the judge.")] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Requests to the judge side by side.")] = 1,
    model: Annotated[str | None, typer.Option("--model", help="Base model of a folder with an adapter alone.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Which seed of a comparison; else its first.")] = None,
    device: DeviceFlag = None,
) -> None:
    """Let a language model behind an OpenAI-compatible address score the answers of two models, 1 to 10 each.

    A server that wants a key gets that of the environment variable OPENAI_API_KEY.
    """
    from bellwether.ask.answerers import find_answerer
    from bellwether.ask.judge import JudgeSettings
    from bellwether.ask.judge import judge as run_judge
    from bellwether.ask.judge_api import find_judge
    from bellwether.ask.judge_table import judgement_files, table
    from bellwether.tell.narrate import plain_lines
    from bellwether.tools.atomic import write_atomic

    a, b = (find_answerer(text, seed=seed, model=model) for text in (folder_a, folder_b))
    settings = JudgeSettings(
        find_judge(judge, address, temperature), repeats, tuple(category or ()), limit, max_new_tokens, jobs, device
    )
    judgement = run_judge(a, b, questions, settings, out, watch=plain_lines(_say))
    names, console = {"A": folder_a, "B": folder_b}, _console()
    for name, text in judgement_files(judgement, names).items():
        write_atomic(out / name, text.encode())
    console.print(table(judgement, names, ascii_only=console.options.ascii_only))
    _say(f"Result, answers and verdicts are in {out}.")


@app.command(short_help="Talk to the result in the terminal.")
def chat(
    folder: TalkFolder,
    who: Annotated[list[str] | None, typer.Option("--who", help="Who answers; may be given several times.")] = None,
    model: ModelFlag = None,
    device: DeviceFlag = None,
    seed: TalkSeed = None,
) -> None:
    """Ask the untuned base and the adapters of a folder side by side; without a terminal, one instruction per line."""
    from bellwether.ask.chat import chat as talk

    refused = talk(folder, who or (), seed=seed, model=model, device=device, console=_console())
    if refused:
        raise typer.Exit(2)


@app.command(short_help="Talk to the result on a web page.")
def ui(
    folder: TalkFolder,
    host: Annotated[str, typer.Option("--host", help="Address to listen at; 0.0.0.0 lets other machines in.")] = LOCAL,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes one that is free.")] = 7860,
    model: ModelFlag = None,
    device: DeviceFlag = None,
    seed: TalkSeed = None,
) -> None:
    """Serve a web page that asks the untuned base and the adapters of a folder side by side."""
    from bellwether.ask.ui import serve

    serve(folder, host=host, port=port, seed=seed, model=model, device=device, say=_say)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; every error of ours becomes one sentence on stderr and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what a terminal cannot show shall not end a run
    try:
        app(args=list(arguments) if arguments is not None else None)
    except BellwetherError as error:
        _complain(str(error))
        sys.exit(1 if isinstance(error, (RoundFailed, JudgeAway)) else 2)
    except OSError as error:
        # What no room foresaw, such as a path that is too long: the system's own words are clear enough.
        _complain(f"{error.filename or 'The system'}: {error.strerror or error}; give another path, or mend this one.")
        sys.exit(2)
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer turns an interrupt into this code, and says nothing
            command = next(iter(arguments if arguments is not None else sys.argv[1:]), "")
            _complain(f"interrupted; {_AFTERWARDS.get(command, _GO_ON)}")
        raise


def _say(text: str) -> None:
    """Write a sentence to stdout, on one line, at once."""
    sys.stdout.write(f"{printable(text)}\n")
    sys.stdout.flush()


def _complain(text: str) -> None:
    """Write sentences to stderr, one per line."""
    for line in text.split("\n"):
        sys.stderr.write(f"bellwether: {printable(line)}\n")


def printable(text: str) -> str:
    """Return text with control characters shown as escapes, so that data cannot steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _run(recipe: Recipe | None, resume: Path | None) -> None:
    """Run with a live view, then show the summary."""
    from bellwether.runner.run import run as run_recipe
    from bellwether.tell.live import watching
    from bellwether.tell.narrate import summary

    console = _console()
    with watching(console) as watcher:
        result = run_recipe(recipe, resume=resume, watch=watcher)
    console.print(summary([*result.rounds, *result.evaluations], ascii_only=console.options.ascii_only))
    _say(f"Adapter, scores and records are in {result.folder}.")
    _report(result.folder)


def _report(folder: Path) -> None:
    """Write the report on what is finished in a folder, and say where it is.

    Raises:
        CheckpointError: it cannot be written; what is finished stays as it is.
    """
    from bellwether.report.report import report

    try:
        path = report(folder)
    except CheckpointError as error:
        raise CheckpointError(
            f"Results are in {folder}, but their report is not; bellwether report {folder}. {error}"
        ) from error
    _say(f"Report: {path}")


def _flags(
    model: str | None,
    data: list[str] | None,
    rounds: int | None,
    seed: int | None,
    device: str | None,
    out: Path | None = None,
) -> list[str]:
    """Return the overrides that flags stand for."""
    given: dict[str, Any] = {
        "model.path": model,
        "federation.rounds": rounds,
        "seed": seed,
        "model.device": device,
        "output.folder": str(out) if out else None,
    }
    flags = [f"{field}={_quoted(value)}" for field, value in given.items() if value is not None]
    if data:
        # Other rows bring no test rows along: those of the recipe would be rows of another data set.
        flags += [f"data.sources=[{', '.join(map(_quoted, data))}]", *_CLEARED]
    return flags


def _quoted(value: Any) -> str:
    """Return a value as YAML in one line."""
    import json

    return json.dumps(value)


def _recipe(words: list[str] | None, flags: list[str], default: str = "default") -> Recipe:
    """Return the recipe that the command line describes, or that default; flags win over fields, fields over it."""
    fields = [word for word in words or [] if "=" in word]
    given = {field.partition("=")[0] for field in fields}
    flags = [flag for flag in flags if flag not in _CLEARED or flag.partition("=")[0] not in given]
    names = [word for word in words or [] if "=" not in word]
    if len(names) > 1:
        fieldlike = [name for name in names if name.partition(".")[0] in Recipe.model_fields]
        if fieldlike:
            raise RecipeError(f"command line: {fieldlike[0]!r} sets no value; write {fieldlike[0]}=VALUE.")
        raise RecipeError(f"command line: give one recipe, not {len(names)} ({', '.join(names)}).")
    if names:
        return load_recipe(find_recipe(names[0]), [*fields, *flags])
    models = [word.partition("=")[2].strip("\"'") for word in [*fields, *flags] if word.startswith("model.path=")]
    other_model = models[-1:] not in ([], ["starter"])
    if other_model and not any(word.startswith("training.learning_rate=") for word in fields):
        sys.stderr.write(
            f"bellwether: training.learning_rate is {USUAL_RATE:g}, since the default recipe's suits the embedded base "
            "only; set it to change it.\n"
        )
        fields.insert(0, f"training.learning_rate={USUAL_RATE}")
    if _only_embedded([word for word in [*fields, *flags] if word.startswith("data.sources=")]):
        return load_recipe(default, [*fields, *flags])
    recipe = load_recipe(None, [*fields, *flags])
    sys.stderr.write(
        "bellwether: fields that you do not set have their own defaults, since the default recipe's partition and "
        "rounds suit the embedded rows only.\n"
    )
    return recipe


def _only_embedded(sources: Sequence[str]) -> bool:
    """Return whether the fields that name sources, of which there may be none, name embedded rows alone."""
    try:
        return all(source.partition(":")[0] == "starter" for source in load_recipe(None, sources).data.sources)
    except RecipeError:  # told together with the mistakes of other fields
        return False


def _resumed_recipe(folder: Path, words: list[str], flags: list[str]) -> Recipe | None:
    """Return the recipe that the command line asks a run to go on with; None where it asks for nothing."""
    from bellwether.store.checkpoint import RECIPE

    if not words and not flags:
        return None
    if any("=" not in word for word in words) or not (folder / RECIPE).is_file():
        return _recipe(words, flags)
    return load_recipe(folder / RECIPE, [*words, *flags])


def _console() -> Any:
    """Return a console for stdout."""
    from rich.console import Console

    return Console()
