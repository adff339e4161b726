"""Commands from rows and a model to an adapter: run, and what helps to prepare one."""

from __future__ import annotations

import sys
import textwrap
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bellwether.cli.given import check_rounds, given_recipe, of_one_seed, resumed_recipe, trusted_recipe
from bellwether.cli.going_on import command_line, going_on
from bellwether.cli.look import report_on
from bellwether.cli.options import (
    DataFlag,
    DeviceFlag,
    JobsFlag,
    ModelFlag,
    OutFlag,
    ResumeFlag,
    RoundsFlag,
    SeedFlag,
    TrustFlag,
    Words,
    check_folder_flags,
    fields_of_flags,
    fields_of_reading,
)
from bellwether.cli.say import complain, console, say
from bellwether.errors import RecipeError

if TYPE_CHECKING:
    from bellwether.recipe.recipe import Recipe


def tune_model(
    words: Words = None,
    model: ModelFlag = None,
    data: DataFlag = None,
    out: OutFlag = None,
    rounds: RoundsFlag = None,
    seed: SeedFlag = None,
    device: DeviceFlag = None,
    jobs: JobsFlag = None,
    resume: ResumeFlag = None,
    trust: TrustFlag = False,
) -> None:
    """Tune a model with simulated clients, and write adapter, scores and records to a run folder."""
    flags = fields_of_flags(model, data, rounds, seed, device, out, jobs)
    if jobs is not None:
        flags.append("compare=null")  # the arms of a recipe, which run side by side otherwise, are not run
    check_folder_flags(out, resume)
    if resume is None:
        _run(trusted_recipe(words, flags, trust), None)
    else:
        _run(resumed_recipe(resume, words or [], flags, trust), resume)


def _run(recipe: Recipe | None, resume: Path | None) -> None:
    """Run with a live view, then show the summary."""
    from bellwether.exchange.records import Event, RunStarted
    from bellwether.runner.run import run
    from bellwether.tell.live import watching
    from bellwether.tell.narrate import summary, tell_all

    screen, folder = console(), [resume] if resume else []

    def begun(event: Event) -> None:
        if isinstance(event, RunStarted):
            folder[:] = [Path(event.folder)]

    def how() -> str | None:
        # A run of which nothing was finished leaves no folder.
        kept = [path for path in folder if path.is_dir()]
        return f"what is finished is kept; go on with: {command_line(['run', '--resume', *kept])}" if kept else None

    with going_on(how), watching(screen) as watcher:
        result = run(recipe, resume=resume, watch=tell_all([begun, watcher]))
    screen.print(summary([*result.rounds, *result.evaluations], ascii_only=screen.options.ascii_only))
    say(f"Adapter, scores and records are in {result.folder}.")
    report_on(result.folder)


def show_plan(
    words: Words = None,
    model: ModelFlag = None,
    data: DataFlag = None,
    rounds: RoundsFlag = None,
    seed: SeedFlag = None,
    device: DeviceFlag = None,
    trust: TrustFlag = False,
) -> None:
    """Say what a run, or a comparison, will need (memory, tokens, bytes, time) before anything is loaded."""
    recipe = trusted_recipe(words, fields_of_flags(model, data, rounds, seed, device), trust, arms=True)
    recipe = of_one_seed(recipe, seed)
    check_rounds(recipe, rounds)
    if recipe.compare is not None:
        from bellwether.arms.plan import comparison_plan_table, plan_comparison

        console().print(comparison_plan_table(plan_comparison(recipe)))
        return
    from bellwether.runner.plan import plan, plan_table

    console().print(plan_table(plan(recipe)))


def show_clients(
    words: Words = None,
    model: ModelFlag = None,
    data: DataFlag = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for clients.png and clients.svg.")] = Path("."),
    seed: SeedFlag = None,
    show: Annotated[int, typer.Option("--show", min=0, help="Show so many rows as the model sees them.")] = 0,
    trust: TrustFlag = False,
) -> None:
    """Show what each client holds: a table, a picture of categories per client, and rows with what is trained."""
    recipe = trusted_recipe(words, fields_of_flags(model, data, seed=seed), trust)
    from bellwether.report.holdings import draw, table
    from bellwether.runner.describe import describe
    from bellwether.runner.prepare import prepare
    from bellwether.tools.atomic import make_folder

    prepared = prepare(recipe)
    description = describe(prepared.federated, prepared.clients)
    screen = console()
    screen.print(table(description))
    if show:
        from bellwether.report.rows import ASCII_MARKS, MARKS, shown_rows

        in_colour = screen.is_terminal and screen.color_system is not None and not screen.no_color
        marks = None if in_colour else ASCII_MARKS if screen.options.ascii_only else MARKS
        for row in shown_rows(prepared.clients, prepared.base.tokenizer, show, marks=marks):
            screen.print(row, soft_wrap=True)
    for text in prepared.notes:
        say(text)
    for text in prepared.warnings:
        complain(f"warning: {text}")
    make_folder(out)
    for path in draw(description, out):
        say(f"Wrote {path}.")


def show_recipe(
    words: Words = None,
    model: ModelFlag = None,
    data: DataFlag = None,
    rounds: RoundsFlag = None,
    seed: SeedFlag = None,
    device: DeviceFlag = None,
    names: Annotated[bool, typer.Option("--list", help="List the shipped recipes, with a sentence on each.")] = False,
) -> None:
    """Print a recipe with every field, its value, unit and meaning."""
    from bellwether.recipe.file import dump_recipe, first_sentence, shipped

    if names:
        width = max(map(len, shipped())) + 2
        for name in shipped():
            lines = textwrap.wrap(first_sentence(name), 96 - width, break_on_hyphens=False)
            sys.stdout.write(
                "".join(f"{head:{width}}{line}\n" for head, line in zip_longest([name], lines, fillvalue=""))
            )
        return
    recipe = given_recipe(words, fields_of_flags(model, data, rounds, seed, device))
    sys.stdout.write(dump_recipe(recipe, comments=True))


def propose_recipe(
    files: Annotated[list[Path], typer.Argument(help="Your data files, or a folder with one file per client.")],
    out: Annotated[Path, typer.Option("--out", help="Recipe to write.")] = Path("recipe.yaml"),
    model: ModelFlag = None,
    instruction: Annotated[
        list[str] | None,
        typer.Option(
            "--instruction",
            metavar="COLUMN",
            help="Column of the instruction; FILE=COLUMN for one of several files.",
        ),
    ] = None,
    response: Annotated[
        list[str] | None, typer.Option("--response", metavar="COLUMN", help="Column of the response.")
    ] = None,
    context: Annotated[
        list[str] | None, typer.Option("--context", metavar="COLUMN", help="Column of the context; '' is none.")
    ] = None,
    category: Annotated[
        list[str] | None, typer.Option("--category", metavar="COLUMN", help="Column of the category; '' is none.")
    ] = None,
    messages: Annotated[
        list[str] | None, typer.Option("--messages", metavar="COLUMN", help="Column of chats, instead of these.")
    ] = None,
    group: Annotated[
        list[str] | None, typer.Option("--group", metavar="COLUMN", help="Column of the language or domain.")
    ] = None,
    encoding: Annotated[
        str | None, typer.Option("--encoding", help="Encoding of text files that are not UTF-8, such as cp1252.")
    ] = None,
    delimiter: Annotated[
        str | None, typer.Option("--delimiter", help="Between the fields of CSV files, where it is not found out.")
    ] = None,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Leave rows out that cannot be read, and count them.")
    ] = False,
) -> None:
    """Look at your data files and write a commented recipe for them.

    Where no column looks like an instruction or a response, the recipe shows the columns and says where to choose.
    """
    from bellwether.recipe.file import load_recipe
    from bellwether.runner.init import propose
    from bellwether.tools.atomic import write_atomic

    if out.exists():
        raise RecipeError(f"{out} exists already; remove it, or name another file with --out.")
    given = {
        "instruction": instruction,
        "response": response,
        "context": context,
        "category": category,
        "messages": messages,
        "group": group,
    }
    reading = load_recipe(None, fields_of_reading(encoding, delimiter, skip_bad_rows)).data
    proposal = propose(files, model, {role: columns for role, columns in given.items() if columns}, reading)
    write_atomic(out, proposal.text.encode())
    for text in proposal.warnings:
        complain(f"warning: {text}")
    if proposal.to_choose:
        missing = " and ".join(f"the {role}" for role in proposal.to_choose)
        say(f"Wrote {out}. No column looks like {missing}: choose where ??? stands. Then: bellwether data {out}")
        return
    say(f"Wrote {out}. Next: bellwether data {out}, bellwether plan {out}, bellwether run {out}")
