"""The command ``bellwether``: its list of commands, in the order of its help."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any

import click
import typer
from typer.core import TyperCommand, TyperGroup

from bellwether.cli import ask, audit, compare, federation, look, site, tune
from bellwether.tools.version import VERSION
from bellwether.tools.words import nearest


def _without_backslashes(formatter: click.HelpFormatter) -> None:
    """Take out what typer puts before brackets for rich, which does not write this help."""
    formatter.buffer = [text.replace("\\[", "[") for text in formatter.buffer]


class _Command(TyperCommand):
    """A command that suggests an option only where one is near."""

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the help."""
        super().format_help(ctx, formatter)
        _without_backslashes(formatter)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take the words of the command line."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            options = [option for parameter in self.get_params(ctx) for option in parameter.opts if option[:2] == "--"]
            near = nearest(error.option_name.lstrip("-"), [option[2:] for option in options])
            raise click.NoSuchOption(error.option_name, None, [f"--{near}"] if near else None, ctx) from error


class _Commands(TyperGroup):
    """The commands, of which one is suggested only where it is near."""

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the help."""
        super().format_help(ctx, formatter)
        _without_backslashes(formatter)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that the words name, and its words."""
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            near = nearest(args[0], self.commands)
            meant = f"did you mean {near}?" if near else f"there are {', '.join(self.commands)}."
            ctx.fail(f"there is no command {args[0]!r}; {meant}")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="bellwether",
    cls=_Commands,
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


def _add(name: str, command: Callable[..., Any], short_help: str) -> None:
    app.command(name, cls=_Command, short_help=short_help)(command)


_add("run", tune.tune_model, "Tune a model with simulated clients.")
_add("compare", compare.compare_arms, "Compare untuned, alone, centralized and federated.")
_add("audit", audit.audit_privacy, "Attack a recipe's privacy.")
_add("plan", tune.show_plan, "Say what a run will need.")
_add("data", tune.show_clients, "Show what each client holds.")
_add("recipe", tune.show_recipe, "Print a recipe with every field.")
_add("init", tune.propose_recipe, "Write a recipe for your data files.")
_add("report", look.write_report, "Write the report on a run or comparison.")
_add("export", look.export_model, "Merge an adapter into its base model.")
_add("judge", ask.judge_answers, "Let a language model judge two models' answers.")
_add("chat", ask.chat_in_terminal, "Talk to the result in the terminal.")
_add("ui", ask.serve_page, "Talk to the result on a web page.")
app.add_typer(federation.federation, name="federation", cls=_Commands, short_help="Federate across sites, on Flower.")
app.add_typer(site.site, name="site", cls=_Commands, short_help="Be a site of a federation.")
