"""A language model behind an OpenAI-compatible address, asked one question at a time.

The key comes from the environment (``OPENAI_API_KEY``) and goes into requests alone: it is in no file, no message and
no error, also where a server repeats it in what it answers. A server on one's own machine usually needs none.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from bellwether.errors import JudgeAway, JudgeError, JudgeRefused, first_line
from bellwether.tools.json_text import KEPT, Count

if TYPE_CHECKING:
    import openai

KEY = "OPENAI_API_KEY"
ADDRESS = "https://api.openai.com/v1"
NO_KEY = "none"  # the client wants some text where a server needs no key

# The client itself waits between tries, twice as long each time up to 8 s, or as long as the server asks (Retry-After,
# up to a minute), after rate limits, time-outs, server errors and lost connections.
RETRIES = 8
TIMEOUT = 300.0  # seconds for one reply
FIRST_TIMEOUT = 30.0  # seconds for the first sign of life
_LONGEST = 200  # characters of what a server says that an error repeats
_SHORTEST_KEY = 8  # of keys that are looked for in texts; shorter ones are no secrets, and parts of words


@dataclass(frozen=True)
class Judge:
    """Whom to ask, and how.

    Args:
        model: the model's name at the server.
        address: base URL of the server.
        temperature: of sampling; None leaves it to the server.
        timeout: seconds for one reply.
        retries: tries after the first, where the failure may pass.
    """

    model: str
    address: str = ADDRESS
    temperature: float | None = None
    timeout: float = TIMEOUT
    retries: int = RETRIES


@dataclass(frozen=True)
class JudgeReply:
    """What a judge answered.

    Args:
        text: as it came.
        model: the model's name as the server says it.
        prompt_tokens: tokens of the request; None where the server does not count.
        reply_tokens: tokens of the reply, thoughts included; None where the server does not count.
    """

    __pydantic_config__ = KEPT

    text: str
    model: str
    prompt_tokens: Count | None
    reply_tokens: Count | None


def find_judge(model: str, address: str | None, temperature: float | None) -> Judge:
    """Return a judge, once its address is known to be one.

    Args:
        model: the model's name at the server.
        address: base URL; None takes that of the environment (``OPENAI_BASE_URL``), else OpenAI's own.
        temperature: of sampling; None leaves it to the server.

    Raises:
        JudgeError: the address is none, or holds a secret.
    """
    address = address or os.environ.get("OPENAI_BASE_URL", "").strip() or ADDRESS
    try:
        parts = urlsplit(address)
        secret = bool(parts.username or parts.password or parts.query or parts.fragment)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        secret, usable = False, False
    if secret:  # it is not shown: it would stand in results and logs
        raise JudgeError(f"--address holds a user, a password or a query; give the key in {KEY} instead.")
    if not usable:
        raise JudgeError(f"--address is {address!r}, which is no URL; give one such as {ADDRESS}.")
    return Judge(model, address.rstrip("/"), temperature)


def connect(judge: Judge) -> openai.AsyncOpenAI:
    """Return a client, to be used as a context.

    Raises:
        JudgeError: the package openai is missing, or the key cannot be sent.
    """
    if importlib.util.find_spec("openai") is None:
        raise JudgeError(
            "A judge needs the package openai, which is not installed: in the clone of this project, "
            "run pip install -e '.[judge]'."
        )
    import openai

    key = _key()
    if key is not None and not (key.isascii() and key.isprintable()):
        raise JudgeError(f"{KEY} has characters that no key has; set it again, without quotation marks or line breaks.")
    return openai.AsyncOpenAI(
        api_key=key or NO_KEY, base_url=judge.address, timeout=judge.timeout, max_retries=judge.retries
    )


async def check(judge: Judge) -> None:
    """Check, at no cost, that a server is there and takes the key.

    Raises:
        JudgeError: what ``connect`` raises, or the server refuses the key.
        JudgeAway: no server answers at the address.
    """
    once = replace(judge, timeout=min(judge.timeout, FIRST_TIMEOUT), retries=0)
    async with connect(once) as client:
        import openai

        try:
            await client.models.list()
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.APIConnectionError) as error:
            raise translated(error, once) from error
        except (openai.OpenAIError, ValueError, TypeError, AttributeError):
            pass  # not every server lists its models


async def ask(client: openai.AsyncOpenAI, judge: Judge, prompt: str) -> JudgeReply:
    """Return a judge's reply.

    Args:
        client: of ``connect``.
        judge: whom to ask.
        prompt: the request.

    Raises:
        JudgeError: the server refuses, or answers something else than a reply.
        JudgeRefused: the server refuses this request, and may take others.
        JudgeAway: it does not answer, however often it is asked.
    """
    import openai

    sampling: dict[str, Any] = {} if judge.temperature is None else {"temperature": judge.temperature}
    try:
        completion: Any = await client.chat.completions.create(
            model=judge.model, messages=[{"role": "user", "content": prompt}], **sampling
        )
        # The client takes whatever a server sends for a completion, so nothing is sure of what is in it.
        text = completion.choices[0].message.content or ""
        if not isinstance(text, str):
            raise TypeError("a reply that is no text")
        return JudgeReply(
            text=without_key(text),
            model=without_key(str(completion.model or "")),
            prompt_tokens=_count(completion.usage, "prompt_tokens"),
            reply_tokens=_count(completion.usage, "completion_tokens"),
        )
    except openai.OpenAIError as error:
        raise translated(error, judge) from error
    except (ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise JudgeError(
            f"{judge.address} answers, but not as an OpenAI-compatible server does; give another --address "
            "(most end with /v1)."
        ) from error


def _count(usage: Any, name: str) -> int | None:
    """Return a number of tokens; None where the server does not say it."""
    count = getattr(usage, name, None)
    return count if type(count) is int and 0 <= count < 2**53 else None


def without_key(text: str) -> str:
    """Return a text that came from a server without the key, should it hold it."""
    key = _key()
    return text.replace(key, f"[{KEY}]") if key and len(key) >= _SHORTEST_KEY else text


def translated(error: Exception, judge: Judge) -> JudgeError:
    """Return the error to raise for one of the client's."""
    import openai

    where, tries = f"The judge at {judge.address}", f"{judge.retries + 1} tries" if judge.retries else "one try"
    match error:
        case openai.AuthenticationError() | openai.PermissionDeniedError():
            wanted = "refuses the key in" if _key() else "wants a key; set"
            return JudgeError(f"{where} {wanted} {KEY} ({_said(error)}).")
        case openai.NotFoundError():
            return JudgeError(
                f"{where} does not know the model {judge.model!r}, or is no OpenAI-compatible server ({_said(error)}); "
                "mend --judge or --address (most end with /v1)."
            )
        case openai.APITimeoutError():
            return JudgeAway(f"{where} did not answer within {judge.timeout:g} s, in {tries}.")
        case openai.APIConnectionError():
            reason = str(error.__cause__ or error).strip().rstrip(".:") or type(error).__name__
            return JudgeAway(f"{where} cannot be reached ({without_key(reason)}); start it, or mend --address.")
        case openai.RateLimitError() | openai.InternalServerError():
            return JudgeAway(f"{where} still does not answer after {tries} ({_said(error)}).")
        case openai.APIStatusError(status_code=400 | 413 | 422):
            return JudgeRefused(f"{where} refuses the request ({_said(error)}).", without_key(str(error)))
    return JudgeError(f"{where} refuses the request ({_said(error)}).")


def _said(error: Exception) -> str:
    """Return status and first words of what a server says."""
    words = without_key(first_line(error))
    return words if len(words) <= _LONGEST else f"{words[:_LONGEST]} ..."


def _key() -> str | None:
    """Return the key; None where there is none."""
    return os.environ.get(KEY, "").strip() or None
