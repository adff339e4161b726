"""The command ``bellwether``: its list of commands, in the order of its help."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from bellwether.cli import ask, compare, federation, look, site, tune
from bellwether.tools.version import VERSION

app = typer.Typer(
    name="bellwether",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    """Print the version and end, where it is asked for."""
    if wanted:
        sys.stdout.write(f"bellwether {VERSION}\n")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Federated instruction tuning of language models: the base stays frozen, only LoRA adapters travel."""


app.command("run", short_help="Tune a model with simulated clients.")(tune.tune_model)
app.command("compare", short_help="Compare untuned, alone, centralized and federated.")(compare.compare_arms)
app.command("plan", short_help="Say what a run will need.")(tune.show_plan)
app.command("data", short_help="Show what each client holds.")(tune.show_clients)
app.command("recipe", short_help="Print a recipe with every field.")(tune.show_recipe)
app.command("init", short_help="Write a recipe for your data files.")(tune.propose_recipe)
app.command("report", short_help="Write the report on a run or comparison.")(look.write_report)
app.command("export", short_help="Merge an adapter into its base model.")(look.export_model)
app.command("judge", short_help="Let a language model judge two models' answers.")(ask.judge_answers)
app.command("chat", short_help="Talk to the result in the terminal.")(ask.chat_in_terminal)
app.command("ui", short_help="Talk to the result on a web page.")(ask.serve_page)
app.add_typer(federation.federation, name="federation", short_help="Federate across sites, on Flower.")
app.add_typer(site.site, name="site", short_help="Be a site of a federation.")
