"""Commands that ask tuned models: a judge over two of them, and a person at the terminal or on a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bellwether.cli.given import agree, agree_to_folder
from bellwether.cli.going_on import command_line, going_on
from bellwether.cli.options import DeviceFlag, ModelFlag, TalkFolder, TalkSeed, TrustFlag
from bellwether.cli.say import console, say

LOCAL = "127.0.0.1"


def judge_answers(
    context: typer.Context,
    folder_a: Annotated[
        str, typer.Argument(help="Folder of run, comparison, adapter or model; FOLDER:NAME of several.")
    ],
    folder_b: Annotated[str, typer.Argument(help="The other model, whose sum is divided by the first one's.")],
    questions: Annotated[Path, typer.Option("--questions", help="Vicuna's format, or rows of instructions.")],
    judge: Annotated[
        str | None,
        typer.Option("--judge", help="Name of the judging model at its server; without one, answers are kept."),
    ] = None,
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
    trust: TrustFlag = False,
) -> None:
    """Let a language model behind an OpenAI-compatible address score the answers of two models, 1 to 10 each.

    Without --judge both models answer, and the answers are kept until there is one. A server that wants a key gets
    that of the environment variable OPENAI_API_KEY.
    """
    from bellwether.ask.answerers import find_answerer
    from bellwether.ask.judge import JudgeSettings, keep_answers
    from bellwether.ask.judge import judge as run_judge
    from bellwether.ask.judge_api import find_judge
    from bellwether.ask.judge_table import judgement_files, table
    from bellwether.errors import JudgeError
    from bellwether.recipe.consent import model_code
    from bellwether.tell.narrate import plain_lines
    from bellwether.tools.atomic import write_atomic
    from bellwether.tools.words import counted

    a, b = (find_answerer(text, seed=seed, model=model) for text in (folder_a, folder_b))
    for text, answerer in ((folder_a, a), (folder_b, b)):
        agree(text, model_code(answerer.recipe), trust)
    if judge is None and (address or temperature is not None):
        given = "--address" if address else "--temperature"
        raise JudgeError(f"{given} is given, but without --judge nobody is asked; give --judge, or leave it out.")
    examiner = None if judge is None else find_judge(judge, address, temperature)
    settings = JudgeSettings(examiner, repeats, tuple(category or ()), limit, max_new_tokens, jobs, device)

    def how() -> str | None:
        again = command_line(context.obj or [])
        return f"answers and verdicts are kept in {out}; go on with: {again}" if out.is_dir() else None

    if judge is None:
        with going_on(how):
            count = keep_answers(a, b, questions, settings, out, watch=plain_lines(say))
        say(f"The answers of both to {counted(count, 'question')} are in {out}; the same command with --judge goes on.")
        return
    with going_on(how):
        judgement = run_judge(a, b, questions, settings, out, watch=plain_lines(say))
    names, screen = {"A": folder_a, "B": folder_b}, console()
    for name, content in judgement_files(judgement, names).items():
        write_atomic(out / name, content.encode())
    screen.print(table(judgement, names, ascii_only=screen.options.ascii_only))
    say(f"Result, answers and verdicts are in {out}.")


def chat_in_terminal(
    folder: TalkFolder,
    who: Annotated[list[str] | None, typer.Option("--who", help="Who answers; may be given several times.")] = None,
    model: ModelFlag = None,
    device: DeviceFlag = None,
    seed: TalkSeed = None,
    trust: TrustFlag = False,
) -> None:
    """Ask the untuned base and the adapters of a folder side by side; without a terminal, one instruction per line."""
    agree_to_folder(folder, trust, model, rows=True)
    from bellwether.ask.chat import chat

    refused = chat(folder, who or (), seed=seed, model=model, device=device, console=console())
    if refused:
        raise typer.Exit(2)


def serve_page(
    folder: TalkFolder,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen at; 0.0.0.0 lets others in, who need a token.")
    ] = LOCAL,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes one that is free.")] = 7860,
    model: ModelFlag = None,
    device: DeviceFlag = None,
    seed: TalkSeed = None,
    trust: TrustFlag = False,
) -> None:
    """Serve a web page that asks the untuned base and the adapters of a folder side by side."""
    agree_to_folder(folder, trust, model, rows=True)
    from bellwether.ask.ui import serve

    serve(folder, host=host, port=port, seed=seed, model=model, device=device, say=say)
