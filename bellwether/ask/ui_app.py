"""What can be said to the page: four addresses, and a question whose every part is checked before anything sees it.

    GET  /                     the page, with what can be chosen
    GET  /page.css, /page.js   its style and its script
    POST /ask                  a question as JSON; its answers as server-sent events, while they are made

There is no address for files: the page makes the conversation's file itself, of what it was told.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from bellwether.ask.questions import AnswerSettings, make_question
from bellwether.ask.talk import Answer, Exchange, Talk, conversation, find_examples, first_asked, tokens_said
from bellwether.ask.ui_guard import Guard, sentence
from bellwether.ask.ui_turns import Turn, Turns
from bellwether.data.rows import Row
from bellwether.errors import BellwetherError, RecipeError
from bellwether.tools.words import clean

FOLDER = Path(__file__).parent / "page"
SIDE_BY_SIDE = 6  # answers that the page has room for
LONGEST_INSTRUCTION, LONGEST_CONTEXT = 20_000, 100_000  # characters
# Bytes of a question: every character of its texts takes four at most, unless it is written as an escape.
LARGEST = 512 * 1024
SLOWEST = 20.0  # seconds until all of a question must have come


class Asked(BaseModel):
    """What the page asks, as it comes from whoever reaches the server.

    Args:
        instruction: as it was typed.
        context: as it was typed; may be empty.
        example: number of the example that was chosen; None where none was.
        who: numbers of those who shall answer.
        temperature: the logits are divided by it before a token is drawn; 0 takes the likeliest token.
        top_p: only the likeliest tokens that together have this probability can be drawn.
        max_new_tokens: tokens after which an answer is cut.
        seed: what is drawn derives from it; browsers know no greater whole numbers.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    instruction: str = Field(max_length=LONGEST_INSTRUCTION)
    context: str = Field(max_length=LONGEST_CONTEXT)
    example: int | None = Field(ge=0)
    who: tuple[int, ...] = Field(max_length=SIDE_BY_SIDE)
    temperature: float = Field(ge=0, le=2)
    top_p: float = Field(gt=0, le=1)
    max_new_tokens: int = Field(ge=1, le=1024)
    seed: int = Field(ge=0, lt=2**53)

    @property
    def settings(self) -> AnswerSettings:
        """How answers shall be made."""
        return AnswerSettings(float(self.temperature), float(self.top_p), self.max_new_tokens, self.seed)


def make_app(talk: Talk, turns: Turns, *, host: str | None = "localhost", token: str | None = None) -> ASGIApp:
    """Return the page as an ASGI application.

    Args:
        talk: who can be asked.
        turns: the thread that makes the answers.
        host: the name of this machine that it is served at, and that it answers to beside this machine's own
            addresses; None answers to every name, for other machines.
        token: what whoever asks must bring; None lets everybody ask who can reach it.
    """
    page = Page(talk, *find_examples(talk))
    app = FastAPI(
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        exception_handlers={HTTPException: _refused, Exception: _broken},
    )
    for path, kind, content in (
        ("/", "text/html", page.html()),
        ("/page.css", "text/css", (FOLDER / "page.css").read_bytes()),
        ("/page.js", "text/javascript", (FOLDER / "page.js").read_bytes()),
    ):
        app.add_api_route(path, _giving(content, kind), methods=["GET"])

    @app.post("/ask")
    async def ask(request: Request) -> Response:
        asked = page.check(await _body(request))
        turn = turns.begin(lambda turn: page.answer(asked, turn))
        if turn is None:
            raise HTTPException(503, "Several questions wait already; ask again in a while.")
        return _Answering(turn)

    return Guard(app, host=host, token=token)


def _giving(content: bytes, kind: str) -> Callable[[], Any]:
    """Return an endpoint that gives what does not change."""

    async def give() -> Response:
        return Response(content, media_type=kind)

    return give


async def _body(request: Request) -> bytes:
    """Return the body of a question, no more of which is read than a question can have."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "Questions are asked as application/json.")
    length, body = request.headers.get("content-length", "0"), b""
    too_large = HTTPException(413, f"A question has {LARGEST} bytes at most; shorten the instruction or its context.")
    if int(length) > LARGEST:
        raise too_large
    try:
        async with asyncio.timeout(SLOWEST):
            async for part in request.stream():
                body += part
                if len(body) > LARGEST:
                    raise too_large
    except TimeoutError:
        raise HTTPException(408, "The question took too long to come.") from None
    except ClientDisconnect:
        raise HTTPException(400, "The question did not come whole.") from None
    return body


class _Answering(StreamingResponse):
    """Tells how answers grow, as server-sent events; whoever goes away stops them."""

    def __init__(self, turn: Turn) -> None:
        super().__init__(_events(turn), media_type="text/event-stream")
        self._turn = turn

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events, and watch meanwhile whether somebody still listens."""
        watch = asyncio.create_task(_gone(receive))
        watch.add_done_callback(lambda _: self._turn.leave())
        try:
            await self.stream_response(send)
        finally:
            watch.cancel()
            self._turn.leave()


async def _events(turn: Turn) -> Any:
    async for kind, data in turn.news():
        yield f"event: {kind}\ndata: {json.dumps(data)}\n\n"


async def _gone(receive: Receive) -> None:
    """Return when whoever asked has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _refused(_: Request, error: Exception) -> Response:
    """Return what is said to a request that is refused."""
    assert isinstance(error, HTTPException)
    answer = sentence(error.detail, error.status_code)
    answer.headers.update(error.headers or {})
    return answer


async def _broken(_: Request, error: Exception) -> Response:
    """Return what is said where this code itself is wrong; whoever serves the page learns more."""
    _log(error)
    return sentence(BROKEN, 500)


BROKEN = "Something is wrong here that should not be; the terminal of bellwether ui says what."


def _log(error: BaseException) -> None:
    logging.getLogger("bellwether").error("A question met an error that nobody foresaw.", exc_info=error)


# The page -----------------------------------------------------------------------------------------


class Page:
    """What the page shows, and what happens when somebody asks.

    Args:
        talk: who can be asked.
        examples: rows to ask.
        note: says why there are none, if so.
    """

    def __init__(self, talk: Talk, examples: Sequence[Row], note: str) -> None:
        self.talk, self.examples, self.note = talk, examples, note

    def html(self) -> bytes:
        """Return the page as HTML; every value in it is escaped."""
        from jinja2 import Environment, FileSystemLoader, StrictUndefined

        environment = Environment(
            loader=FileSystemLoader(FOLDER),
            autoescape=True,
            undefined=StrictUndefined,
            lstrip_blocks=True,
            trim_blocks=True,
            keep_trailing_newline=True,
        )
        first = first_asked(self.talk.answerers.values())
        return (
            environment.get_template("page.html")
            .render(
                title=clean(self.talk.folder.name),
                facts=_facts(self.talk, self.note),
                who=[(clean(name), name in first) for name in self.talk.names],
                most=SIDE_BY_SIDE,
                examples=[(_label(row), row) for row in self.examples],
                settings=AnswerSettings(),
            )
            .encode()
        )

    def check(self, body: bytes) -> Asked:
        """Return a question once every part of it is one that the page can ask.

        Args:
            body: JSON, as it came.

        Raises:
            HTTPException: with a sentence that says which part is not.
        """
        try:
            asked = Asked.model_validate_json(body)
            _check_numbers("who", asked.who, len(self.talk.names))
            _check_numbers("example", [] if asked.example is None else [asked.example], len(self.examples))
        except ValidationError as error:
            raise HTTPException(422, _what_is_wrong(error)) from None
        except RecipeError as error:
            raise HTTPException(422, _capital(str(error))) from None
        return asked

    def answer(self, asked: Asked, turn: Turn) -> None:
        """Answer a question, and tell how the answers grow.

        Args:
            asked: the question.
            turn: takes what is told.
        """
        try:
            self._answer(asked, turn)
        except BellwetherError as error:
            turn.tell("problem", _capital(str(error)))
        except Exception as error:
            _log(error)
            turn.tell("problem", BROKEN)

    def _answer(self, asked: Asked, turn: Turn) -> None:
        names, settings = [self.talk.names[number] for number in asked.who], asked.settings
        example = None if asked.example is None else self.examples[asked.example]
        question = make_question(asked.instruction, asked.context, example)
        answers = [Answer(name) for name in names]
        with contextlib.closing(self.talk.answer(question, names, settings)) as stream:
            turn.tell("begin", json.loads(conversation(self.talk, [Exchange(question, settings, answers)])))
            for answers in stream:
                if turn.left:
                    return
                turn.tell("answers", [asdict(answer) for answer in answers])
        turn.tell("end", [tokens_said(answer) for answer in answers])


def _check_numbers(what: str, numbers: Sequence[int], count: int) -> None:
    """Check that numbers are known ones, each once.

    Raises:
        RecipeError: one is not.
    """
    for number in numbers:
        if not 0 <= number < count:
            raise RecipeError(f"{what}: there is no number {number}, but {count} from 0 on.")
        if list(numbers).count(number) > 1:
            raise RecipeError(f"{what}: number {number} is there twice; give it once.")


def _what_is_wrong(error: ValidationError) -> str:
    """Return the first thing that is wrong with a question, as a sentence."""
    first = error.errors(include_url=False, include_context=False)[0]
    if first["input"] is None and first["loc"][:1] and first["loc"][0] in AnswerSettings.__dataclass_fields__:
        return "A setting is empty; give every one a number."
    place = ".".join(clean(str(part)) for part in first["loc"]) or "The question"
    value = clean(repr(first["input"]))
    shown = value if len(value) <= 60 else f"{value[:59]}…"
    return _capital(f"{place[:60]}: {first['msg'][:1].lower()}{first['msg'][1:]}; it is {shown}.")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _facts(talk: Talk, note: str) -> list[str]:
    """Return what stands at the head of the page."""
    facts = f"{talk.folder.name} over {talk.base_name}, on {talk.base.device}. Each question is answered by itself."
    return [clean(text) for text in (facts, *talk.notes, note) if text]


def _label(row: Row) -> str:
    """Return how an example is listed."""
    text = clean(f"{row.category}: {row.instruction}" if row.category else row.instruction)
    return text if len(text) <= 90 else f"{text[:89]}…"
