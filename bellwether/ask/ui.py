"""A web page for talking, by gradio: answers side by side while they are made.

    bellwether ui runs/default-1

The page is served on this machine alone unless another address is given, is never shared by a public link, and asks
nothing of other machines: analytics are off, fonts are the browser's, and a content security policy refuses the rest.
Whatever comes from data, models or people stands in text fields, where nothing is markup.
"""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import os
import re
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from bellwether.ask.questions import AnswerSettings, make_question
from bellwether.ask.talk import Answer, Exchange, Talk, conversation, find_examples, first_asked, open_talk, tokens_said
from bellwether.data.rows import Row
from bellwether.errors import BellwetherError, RecipeError
from bellwether.tools.atomic import write_atomic
from bellwether.tools.words import clean

SIDE_BY_SIDE = 6  # answers that the page has room for

# gradio's pages have scripts and styles inside; nothing may come from elsewhere, nor may another page frame this one.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)

# Colours that also the colour-blind tell apart (Okabe and Ito).
CSS = """
.gradio-container { max-width: 1400px !important; margin: 0 auto !important; }
#head h1 { font-size: 1.5rem; font-weight: 650; margin: .25rem 0 0; }
#facts { border: 0; background: none; box-shadow: none; }
#facts textarea { border: 0; background: none; box-shadow: none; padding: 0; resize: none; opacity: .8;
  field-sizing: content; height: auto !important; }
#examples input { padding-right: 1.5rem; text-overflow: ellipsis; }
#problem textarea { color: #b42318; font-weight: 600; }
.dark #problem textarea { color: #f97066; }
.answer { border-top: 4px solid #999999 !important; }
.answer:nth-child(2) { border-top-color: #e69f00 !important; }
.answer:nth-child(3) { border-top-color: #56b4e9 !important; }
.answer:nth-child(4) { border-top-color: #009e73 !important; }
.answer:nth-child(5) { border-top-color: #0072b2 !important; }
.answer:nth-child(6) { border-top-color: #cc79a7 !important; }
.answer textarea { font-size: 1rem; line-height: 1.5; }
.answer [data-testid=block-info] { font-weight: 600; color: var(--body-text-color); }
"""


def serve(
    folder: Path,
    *,
    host: str,
    port: int,
    say: Callable[[str], None],
    seed: int | None = None,
    model: str | None = None,
    device: str | None = None,
) -> None:
    """Serve the page until interrupted.

    Args:
        folder: of a finished run or comparison, of an adapter, or of a model.
        host: address to listen at.
        port: port to listen at; 0 takes one that is free.
        say: takes a sentence for the person who serves it.
        seed: of a comparison, the seed whose adapters are meant.
        model: path or hub name of the base; None takes the one that the folder names.
        device: where the base shall be; None takes what the recipe says.

    Raises:
        RecipeError: gradio is not installed, or the address cannot be listened at.
        BellwetherError: the folder holds nothing that can be asked.
    """
    if importlib.util.find_spec("gradio") is None:
        raise RecipeError(
            "bellwether ui needs gradio, which is not installed; in the clone of this project, "
            "run pip install -e '.[ui]'."
        )
    with _listening(host, port) as listener, tempfile.TemporaryDirectory() as place:
        talk = open_talk(folder, seed=seed, model=model, device=device)
        address, number = listener.getsockname()[:2]
        app = make_app(talk, Path(place), host if _of_this_machine(address) else None)
        import uvicorn

        shown = f"[{host}]" if ":" in host else host
        say(f"Talk at http://{shown}:{number} (Ctrl-C ends).")
        if not _of_this_machine(address):
            say("warning: everybody who can reach this address can ask these models.")
        # A page that is still open when this ends is no error to tell about.
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])


def _listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise RecipeError(
            f"command line: no page can be served at {host}, port {port} ({error.strerror or error}); "
            "give others by --host and --port (0 takes a free port)."
        ) from error


def make_app(talk: Talk, place: Path, host: str | None = "localhost") -> Any:
    """Return the page as an ASGI application.

    Args:
        talk: who can be asked.
        place: an empty folder for conversations to be downloaded.
        host: the name of this machine that it is served at, and that it answers to beside this machine's own
            addresses; None answers to every name, for other machines.
    """
    # Read by gradio when it is imported and when it makes files.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(place), "HF_HUB_DISABLE_TELEMETRY": "1"}
    import gradio
    from fastapi import FastAPI

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_Policy)
    if host is not None:
        app.add_middleware(_OwnNames, host=host)
    theme = gradio.themes.Base(
        primary_hue="teal",
        neutral_hue="slate",
        radius_size="lg",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(
        body_background_fill="*neutral_50",
        input_background_fill="white",
        input_background_fill_dark="*neutral_800",
        input_border_width="1px",
    )
    return gradio.mount_gradio_app(
        app,
        Page(talk, place).build(),
        path="/",
        theme=theme,
        css=CSS,
        ssr_mode=False,
        footer_links=[],
        show_error=False,
        run_history=False,
        max_file_size=1,  # nothing is uploaded
    )


class _Policy:
    """Puts the content security policy before every answer of an ASGI application."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        async def send_with_policy(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self._app(scope, receive, send_with_policy)


class _OwnNames:
    """Refuses requests under other names than this machine's; starlette's own check does not understand ``[::1]``.

    Else a page elsewhere could reach this one under a name of its own that leads to this machine.
    """

    def __init__(self, app: Any, host: str) -> None:
        self._app, self._host = app, host.lower()

    async def __call__(self, scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        from starlette.responses import PlainTextResponse

        app = self._app
        if scope["type"] in ("http", "websocket") and not self._known(dict(scope["headers"]).get(b"host", b"")):
            app = PlainTextResponse("This page does not answer to that name.", status_code=400)
        await app(scope, receive, send)

    def _known(self, header: bytes) -> bool:
        # A name or an address, in brackets if it has colons, and perhaps a port.
        found = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^:\[\]]+))(?::\d*)?", header.decode("latin-1").lower())
        name = found[1] or found[2] if found else ""
        return bool(name) and (name == self._host or _of_this_machine(name))


def _of_this_machine(name: str) -> bool:
    """Return whether nothing but this machine has a name or an address."""
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


# The page -----------------------------------------------------------------------------------------


class Page:
    """The page's fields, and what happens when somebody asks.

    Args:
        talk: who can be asked.
        place: an empty folder for conversations to be downloaded.
    """

    def __init__(self, talk: Talk, place: Path) -> None:
        import gradio

        self.gr = gradio
        self.talk, self.place = talk, place
        self.examples, self.note = find_examples(talk)

    def build(self) -> Any:
        """Return the page as gradio's blocks."""
        gr, title = self.gr, f"bellwether: {clean(self.talk.folder.name)}"
        with gr.Blocks(title=title, analytics_enabled=False, fill_width=True) as page:
            gr.Markdown("# bellwether", elem_id="head")
            gr.Textbox(
                _facts(self.talk, self.note),
                container=False,
                show_label=False,
                interactive=False,
                lines=1,
                elem_id="facts",
            )
            self.exchanges = gr.State([])
            with gr.Row():
                with gr.Column(scale=3, min_width=320):
                    self._build_question()
                with gr.Column(scale=2, min_width=320):
                    self._build_choices()
            self.problem = gr.Textbox(label="Please change", visible=False, elem_id="problem")
            self._build_answers()
            self._build_conversation()
            self._connect()
        return page

    def _build_question(self) -> None:
        """Make the fields of what is asked."""
        gr = self.gr
        # With one line at first, Enter asks; with Shift it breaks the line.
        self.instruction = gr.Textbox(
            label="Instruction", lines=1, max_lines=12, autofocus=True, elem_id="instruction", placeholder="What to do"
        )
        self.context = gr.Textbox(
            label="Context", lines=3, max_lines=12, elem_id="context", placeholder="Text that it speaks of, if any"
        )
        with gr.Row():
            self.ask = gr.Button("Ask", variant="primary", scale=3, min_width=120, elem_id="ask")
            self.stop = gr.Button("Stop", interactive=False, scale=1, min_width=80, elem_id="stop")

    def _build_choices(self) -> None:
        """Make the fields that say who answers, and how."""
        gr, names = self.gr, self.talk.names
        self.who = gr.Dropdown(
            [(clean(name), name) for name in names],
            value=first_asked(self.talk.answerers.values()),
            multiselect=True,
            max_choices=SIDE_BY_SIDE,
            label="Who answers",
            elem_id="who",
        )
        self.chosen = gr.Dropdown(
            [(_label(row), number) for number, row in enumerate(self.examples)],
            value=None,
            label="Examples from held-out rows",
            visible=bool(self.examples),
            elem_id="examples",
        )
        with gr.Accordion("How answers are made", open=False, elem_id="settings"):
            first = AnswerSettings()
            self.settings = [
                gr.Slider(0, 2, first.temperature, step=0.05, label="Temperature (0: the likeliest token)"),
                gr.Slider(0.05, 1, first.top_p, step=0.05, label="Top-p"),
                gr.Slider(1, 1024, first.max_new_tokens, step=1, label="Most new tokens", elem_id="tokens"),
                gr.Number(first.seed, precision=0, minimum=0, label="Seed", elem_id="seed"),
            ]

    def _build_answers(self) -> None:
        """Make the fields of the answers."""
        gr, asked = self.gr, first_asked(self.talk.answerers.values())
        with gr.Row(elem_id="answers"):
            self.boxes = [
                gr.Textbox(
                    label=clean(asked[number]) if number < len(asked) else "",
                    lines=4,
                    max_lines=16,
                    min_width=240,
                    interactive=False,
                    visible=number < len(asked),
                    elem_classes="answer",
                )
                for number in range(min(SIDE_BY_SIDE, len(self.talk.names)))
            ]
        self.reference = gr.Textbox(label="In the data", visible=False, interactive=False, elem_id="reference")

    def _build_conversation(self) -> None:
        """Make the fields of what was said so far."""
        gr = self.gr
        with gr.Accordion("Conversation", open=False, elem_id="conversation"):
            self.said = gr.Textbox(show_label=False, lines=3, max_lines=24, interactive=False, elem_id="said")
            with gr.Row():
                self.download = gr.DownloadButton("Download as JSON", interactive=False, elem_id="download")
                self.clear = gr.Button("Forget it", elem_id="clear")

    def _connect(self) -> None:
        """Say what happens on which event."""
        gr, quick = self.gr, {"show_progress": "hidden", "api_visibility": "private"}
        self.chosen.input(self._take_example, self.chosen, [self.instruction, self.context], **quick)
        self.who.change(self._name_boxes, self.who, self.boxes, **quick)
        shown = [*self.boxes, self.reference, self.problem, self.exchanges, self.ask, self.stop]
        asking = gr.on(
            [self.ask.click, self.instruction.submit],
            self._answer,
            [self.exchanges, self.instruction, self.context, self.chosen, self.who, *self.settings],
            shown,
            concurrency_limit=1,
            **quick,
        )
        kept = [self.said, self.download, self.ask, self.stop]
        asking.then(self._keep, self.exchanges, kept, **quick)
        self.stop.click(self._keep, self.exchanges, kept, cancels=[asking], **quick)
        self.clear.click(list, None, self.exchanges, **quick).then(self._keep, self.exchanges, kept, **quick)

    def _take_example(self, number: int | None) -> tuple[str, str]:
        """Return instruction and context of an example."""
        if number is None:
            return "", ""
        return self.examples[number].instruction, self.examples[number].context

    def _name_boxes(self, names: Sequence[str]) -> list[Any]:
        """Return empty fields for those who are asked."""
        answers = [Answer(name) for name in names]
        return [self._box(answers, number) for number in range(len(self.boxes))]

    def _box(self, answers: Sequence[Answer], number: int, length: str = "") -> Any:
        """Return what a field of an answer shows."""
        if number >= len(answers):
            return self.gr.Textbox(value="", visible=False)
        label = " · ".join(filter(None, (clean(answers[number].name), length)))
        return self.gr.Textbox(value=answers[number].text, label=label, visible=True)

    def _answer(
        self,
        before: list[Exchange],
        instruction: str,
        context: str,
        chosen: int | None,
        names: list[str],
        *values: float | None,
    ) -> Iterator[dict[Any, Any]]:
        """Yield what the fields show while the answers are made."""
        gr = self.gr
        try:
            settings = _settings(values)
            question = make_question(instruction, context, None if chosen is None else self.examples[chosen])
            stream = self.talk.answer(question, names, settings)
            yield {
                self.problem: gr.Textbox(visible=False),
                self.reference: gr.Textbox(value=question.reference, visible=bool(question.reference)),
                self.ask: gr.Button(interactive=False),
                self.stop: gr.Button(interactive=True),
            }
            answers: list[Answer] = []
            for answers in stream:
                boxes = {box: self._box(answers, number) for number, box in enumerate(self.boxes)}
                yield {**boxes, self.exchanges: [*before, Exchange(question, settings, tuple(answers))]}
            yield {
                box: self._box(answers, number, tokens_said(answer))
                for number, (box, answer) in enumerate(zip(self.boxes, answers, strict=False))
            }
        except BellwetherError as error:
            text = str(error)
            yield {self.problem: gr.Textbox(value=text[:1].upper() + text[1:], visible=True)}

    def _keep(self, exchanges: list[Exchange]) -> list[Any]:
        """Return what is shown of the conversation so far, its file, and the buttons for the next question."""
        gr = self.gr
        buttons = [gr.Button(interactive=True), gr.Button(interactive=False)]
        if not exchanges:
            return ["", gr.DownloadButton(value=None, interactive=False), *buttons]
        path = Path(tempfile.mkdtemp(dir=self.place)) / "conversation.json"
        write_atomic(path, conversation(self.talk, exchanges).encode())
        return [transcript(exchanges), gr.DownloadButton(value=str(path), interactive=True), *buttons]


def _facts(talk: Talk, note: str) -> str:
    """Return what stands at the head of the page."""
    facts = f"{talk.folder.name} over {talk.base_name}, on {talk.base.device}. Each question is answered by itself."
    return "\n".join(clean(text) for text in (facts, *talk.notes, note) if text)


def _label(row: Row) -> str:
    """Return how an example is listed."""
    text = clean(f"{row.category}: {row.instruction}" if row.category else row.instruction)
    return text if len(text) <= 90 else f"{text[:89]}…"


def _settings(values: Sequence[float | None]) -> AnswerSettings:
    """Return the settings that stand in the fields."""
    if any(value is None for value in values):
        raise RecipeError("a setting is empty; give every one a number.")
    temperature, top_p, max_new_tokens, seed = (value or 0 for value in values)
    return AnswerSettings(float(temperature), float(top_p), int(max_new_tokens), int(seed))


def transcript(exchanges: Sequence[Exchange]) -> str:
    """Return a conversation as plain text.

    Args:
        exchanges: in their order.
    """
    parts = []
    for number, exchange in enumerate(exchanges, start=1):
        question = exchange.question
        texts = [("Context", question.context), *((one.name, one.text) for one in exchange.answers)]
        texts.append(("In the data", question.reference))
        lines = [f"    {clean(name)}: {text}" for name, text in texts if text or name not in ("Context", "In the data")]
        parts.append("\n".join([f"{number}. {question.instruction}", *lines]))
    return "\n\n".join(parts)
