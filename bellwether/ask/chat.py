"""Talking in the terminal: answers side by side while they are made; without a terminal, one instruction per line.

bellwether chat runs/default-1
echo "Name three colours." | bellwether chat runs/default-1
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from bellwether.ask.questions import AnswerSettings, Question, check_names, check_settings, make_question
from bellwether.ask.talk import Answer, Exchange, Talk, conversation, find_examples, first_asked, open_talk, tokens_said
from bellwether.data.rows import Row
from bellwether.errors import BellwetherError, CheckpointError, RecipeError
from bellwether.tools.atomic import write_atomic
from bellwether.tools.words import clean, clean_lines

STYLES = ("bright_black", "yellow", "magenta", "green", "cyan", "blue")
NARROWEST = 30  # columns of an answer that stands beside others


@dataclass
class Session:
    """What a conversation in the terminal keeps.

    Args:
        talk: who can be asked.
        console: where answers go.
        read: returns the next line after showing a prompt; raises EOFError where there is none.
        live: whether a person sits at the terminal.
        names: who is asked.
    """

    talk: Talk
    console: Console
    read: Callable[[str], str]
    live: bool
    names: list[str]
    context: str = ""
    settings: AnswerSettings = field(default_factory=AnswerSettings)
    exchanges: list[Exchange] = field(default_factory=list)
    examples: list[Row] | None = None
    saved: Path | None = None
    refused: int = 0
    over: bool = False


def chat(
    folder: Path,
    who: Sequence[str] = (),
    *,
    seed: int | None = None,
    model: str | None = None,
    device: str | None = None,
    console: Console | None = None,
) -> int:
    """Talk until the input ends.

    Args:
        folder: of a finished run or comparison, of an adapter, or of a model.
        who: names of those who answer; empty takes one of each kind.
        seed: of a comparison, the seed whose adapters are meant.
        model: path or hub name of the base; None takes the one that the folder names.
        device: where the base shall be; None takes what the recipe says.
        console: where answers go; None takes standard output.

    Returns:
        How many lines were refused, where nobody sits at the terminal to see it; else 0.

    Raises:
        BellwetherError: the folder holds nothing that can be asked, or not who is named.
    """
    console = console or Console()
    live = console.is_terminal and not console.is_dumb_terminal and sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is no text is refused with its line
    with console.status("Loading the base …") if live else contextlib.nullcontext():
        talk = open_talk(folder, seed=seed, model=model, device=device)
    names = list(who) or first_asked(talk.answerers.values())
    check_names(names, talk.names)
    session = Session(talk, console, _typed(console) if live else _piped, live, names)
    for note in talk.notes:
        _tell(session, note)
    if live:
        _welcome(session)
    while not session.over:
        _step(session)
    return 0 if live else session.refused


def _typed(console: Console) -> Callable[[str], str]:
    """Return what reads a line that a person types, with history and editing where the system has them."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    return lambda prompt: console.input(Text(prompt, style="bold"))


def _piped(prompt: str) -> str:
    """Return the next line of standard input."""
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\r\n")


def _step(session: Session) -> None:
    """Take a line and do what it says; the end of the input, or an interrupt of a person, ends the conversation."""
    try:
        line = session.read("ask (with context)> " if session.context else "ask> ")
        if line.startswith("/"):
            _command(session, line)
        elif line.strip():
            _ask(session, make_question(line, session.context))
    except (EOFError, KeyboardInterrupt) as end:
        if isinstance(end, KeyboardInterrupt) and not session.live:
            raise  # a program learns of it by the exit code
        session.over = True
        if session.live:
            session.console.print()
    except BellwetherError as error:
        session.refused += 1
        _complain(session, str(error))


def _welcome(session: Session) -> None:
    """Say who answers, and how to find out more."""
    text = Text.assemble(
        (f"{clean(session.talk.folder.name)}", "bold"), f" over {clean(session.talk.base_name)}. Answering: ",
        *_listed(session.names), ".\nType an instruction, or /help. Ctrl-C stops an answer, Ctrl-D ends.",
    )  # fmt: skip
    session.console.print(text, highlight=False)


def _listed(names: Sequence[str]) -> list[Text]:
    """Return names with semicolons between, each in its colour: names hold commas."""
    texts: list[Text] = []
    for number, name in enumerate(names):
        texts += [Text("; ")] if number else []
        texts.append(Text(clean(name), style=STYLES[number % len(STYLES)]))
    return texts


# Asking -------------------------------------------------------------------------------------------


def _ask(session: Session, question: Question) -> None:
    """Ask a question, and show and keep the answers; an interrupt stops them."""
    answers: list[Answer] = []
    stream = session.talk.answer(question, session.names, session.settings)
    screen = Live(console=session.console, transient=True, vertical_overflow="ellipsis", refresh_per_second=12)
    try:
        with screen if session.live else contextlib.nullcontext():
            for answers in stream:
                if session.live:
                    screen.update(side_by_side(answers, session.console))
    except KeyboardInterrupt:
        if not session.live:
            raise
        _tell(session, "Stopped.")
    finally:
        stream.close()
    if answers:
        session.exchanges.append(Exchange(question, session.settings, tuple(answers)))
        _show(session, session.exchanges[-1])


def _show(session: Session, exchange: Exchange) -> None:
    """Show a question's answers: side by side to a person, else one below the other."""
    question, console = exchange.question, session.console
    if session.live:
        console.print(side_by_side(exchange.answers, console, final=True))
        if question.reference:
            console.print(Text(f"In the data: {clean_lines(question.reference)}", style="dim"))
        return
    lines = [("> ", question.instruction), *((f"{answer.name}: ", answer.text) for answer in exchange.answers)]
    for label, text in lines:
        # Further lines of a text are indented, so that each that is not begins something new.
        shown = f"{clean(label)}{clean_lines(text)}".replace("\n", "\n  ")
        _plain(console, shown)
    _plain(console, "")


def side_by_side(answers: Sequence[Answer], console: Console, *, final: bool = False) -> RenderableType:
    """Return answers in frames, beside each other where there is room.

    Args:
        answers: what has been said so far.
        console: how wide, and with which characters.
        final: whether nothing more will be said, so that lengths can be told.
    """
    ascii_only = console.options.ascii_only
    frames = [
        Panel(
            Text(clean_lines(answer.text, ascii_only)),
            title=Text(clean(answer.name, ascii_only)),
            subtitle=Text(tokens_said(answer), style="dim") if final else None,
            title_align="left",
            subtitle_align="right",
            border_style=STYLES[number % len(STYLES)],
            box=box.ASCII if ascii_only else box.ROUNDED,
        )
        for number, answer in enumerate(answers)
    ]
    if console.width < NARROWEST * len(frames):
        return Group(*frames)
    grid = Table.grid(expand=True)
    for _ in frames:
        grid.add_column(ratio=1)
    grid.add_row(*frames)
    return grid


# Commands -----------------------------------------------------------------------------------------


def _help(session: Session, _: str) -> None:
    """List the commands."""
    for name, (_action, meaning) in COMMANDS.items():
        _plain(session.console, f"{name:<20} {meaning}")
    _plain(session.console, "Anything else is an instruction. Each is answered by itself: earlier ones are not seen.")


def _who(session: Session, rest: str) -> None:
    """List who is here, and choose who answers."""
    known = session.talk.names
    if rest:
        chosen = [_number(word, len(known), "there are answerers") for word in rest.replace(",", " ").split()]
        session.names = [known[number] for number in dict.fromkeys(chosen)]
    for number, name in enumerate(known, start=1):
        _plain(session.console, f"{number:>3} {'*' if name in session.names else ' '} {clean(name)}")


def _context(session: Session, rest: str) -> None:
    """Set the text that instructions speak of."""
    if rest:
        session.context = rest
        return
    lines: list[str] = []
    with contextlib.suppress(EOFError):
        while line := session.read("context> "):
            lines.append(line)
    session.context = "\n".join(lines)
    _tell(session, f"The context has {len(session.context)} characters." if lines else "There is no context.")


def _set(session: Session, rest: str) -> None:
    """Show the settings, and change one."""
    kinds = {name.replace("_", "-"): type(value) for name, value in asdict(session.settings).items()}
    if rest:
        name, _, value = rest.partition(" ")
        if name not in kinds:
            raise RecipeError(f"there is no setting {name!r}; there are {', '.join(kinds)}.")
        try:
            changed = replace(session.settings, **{name.replace("-", "_"): kinds[name](value)})
        except ValueError:
            raise RecipeError(f"{name} is {value!r}; give a {'whole ' if kinds[name] is int else ''}number.") from None
        check_settings(changed)
        session.settings = changed
    for name in kinds:
        _plain(session.console, f"{name:<16} {getattr(session.settings, name.replace('-', '_'))}")


def _examples(session: Session, rest: str) -> None:
    """List held-out rows, or ask one."""
    if not session.examples:
        session.examples, note = find_examples(session.talk)
        if not session.examples:
            _tell(session, note)
            return
    if rest:
        row = session.examples[_number(rest, len(session.examples), "there are examples")]
        if session.live:
            _tell(session, "\n".join(filter(None, (row.instruction, row.context))))
        _ask(session, Question(row.instruction, row.context, row.response))
        return
    for number, row in enumerate(session.examples, start=1):
        _plain(session.console, f"{number:>3} {clean(f'{row.category}: {row.instruction}')}"[: session.console.width])


def _save(session: Session, rest: str) -> None:
    """Write the conversation to a file; one that this conversation wrote before is written anew."""
    if not rest:
        raise RecipeError("name a file to write, as in /save talk.json.")
    path = Path(rest)
    if path.exists() and path != session.saved:
        raise CheckpointError(f"{path} exists already; name another file.")
    write_atomic(path, conversation(session.talk, session.exchanges).encode())
    session.saved = path
    _tell(session, f"Wrote {path}.")


def _quit(session: Session, _: str) -> None:
    """End the conversation."""
    session.over = True


# What can be typed, what it does, and what it means.
COMMANDS: dict[str, tuple[Callable[[Session, str], None], str]] = {
    "/help": (_help, "lists the commands"),
    "/who [NUMBERS]": (_who, "lists who is here; with numbers, chooses who answers"),
    "/context [TEXT]": (_context, "sets the text that instructions speak of; alone, reads lines up to an empty one"),
    "/set [NAME VALUE]": (_set, "shows how answers are made, or sets it: /set temperature 0.7 (0 is greedy)"),
    "/examples [NUMBER]": (_examples, "lists held-out rows of the data, or asks one"),
    "/save FILE": (_save, "writes the conversation as JSON"),
    "/quit": (_quit, "ends, as Ctrl-D does"),
}


def _command(session: Session, line: str) -> None:
    """Do what a line that begins with a slash says."""
    word, _, rest = line.partition(" ")
    actions = {name.partition(" ")[0]: action for name, (action, _) in COMMANDS.items()}
    if word not in actions:
        raise RecipeError(f"there is no command {word!r}; /help lists them. To ask that, put a space before the slash.")
    actions[word](session, rest.strip())


def _number(word: str, most: int, what: str) -> int:
    """Return a number that somebody typed, counted from 0."""
    if not (word.isascii() and word.isdigit() and len(word) < 10 and 1 <= int(word) <= most):
        raise RecipeError(f"{word!r} is none of them: {what}, 1 to {most}.")
    return int(word) - 1


# Showing ------------------------------------------------------------------------------------------


def _plain(console: Console, text: str) -> None:
    """Write lines as they are; a character that the output lacks is escaped, since printing shall end nothing."""
    shown = text.encode(console.encoding, "backslashreplace").decode(console.encoding)
    console.print(Text(shown), soft_wrap=True, highlight=False)


def _tell(session: Session, text: str) -> None:
    """Say something about the conversation; on stderr where answers are read by a program."""
    _aside(session, text, "dim")


def _complain(session: Session, text: str) -> None:
    """Say what is wrong."""
    _aside(session, text, "red")


def _aside(session: Session, text: str, style: str) -> None:
    shown = clean_lines(text)
    if session.live:
        session.console.print(Text(shown, style=style), highlight=False)
    else:
        sys.stderr.write("".join(f"bellwether: {line}\n" for line in shown.split("\n")))
