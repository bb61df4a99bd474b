"""`fourfold chat`: a conversation in a terminal, with a server that is running.

Contract: speaks OpenAI's streaming chat to any URL, over the standard library alone. Ctrl-C ends the
answer that is being written, not the program. It keeps the conversation in memory and nowhere else.
"""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import click

from fourfold.core.errors import ConfigError, FourfoldError

_HELP = """\
/think, /nothink    think before answering, or not
/effort LEVEL       low, high, max
/system TEXT        instructions for the whole conversation
/undo               take back the last question and its answer
/clear              begin anew
/history            show the conversation
/quit               leave (as does Ctrl-D)
Ctrl-C ends an answer. A line that ends with \\ goes on in the next."""
_CONNECT_SECONDS = 10
_ANSWER_SECONDS = 600


class ChatError(FourfoldError):
    """The server cannot be reached, or refused."""

    exit_status = 1


@dataclass
class Conversation:
    """What has been said, and how to answer."""

    model: str | None = None
    thinking: bool = True
    effort: str | None = None
    system: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)

    def body(self) -> dict[str, Any]:
        """The next request."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        body: dict[str, Any] = {
            "messages": [*system, *self.messages],
            "stream": True,
            "stream_options": {"include_usage": True},
            "thinking": self.thinking,
            **self.fields,
        }
        if self.model:
            body["model"] = self.model
        if self.effort and self.thinking:
            body["reasoning_effort"] = self.effort
        return body

    def undo(self) -> None:
        """Forget the last question and what followed it."""
        while self.messages and self.messages.pop()["role"] != "user":
            continue


class Server:
    """Where answers come from."""

    def __init__(self, url: str, key: str | None):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--url must be like http://127.0.0.1:8000, found {url!r}")
        self._parts, self._key = parts, key
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")

    def answer(self, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        """The events of an answer. Raises `ChatError`."""
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            with closing(self._connect()) as connection:
                path = f"{self._prefix}/v1/chat/completions"
                connection.request("POST", path, json.dumps(body), headers)
                if connection.sock is not None:
                    connection.sock.settimeout(_ANSWER_SECONDS)
                response = connection.getresponse()
                if response.status != 200:
                    raise ChatError(_refusal(response.status, response.read(10_000)))
                yield from _events(response)
        except (OSError, http.client.HTTPException) as error:
            raise ChatError(f"{self._parts.netloc} does not answer: {error}") from None

    def _connect(self) -> http.client.HTTPConnection:
        host, port = self._parts.hostname or "", self._parts.port
        if self._parts.scheme == "https":
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(
                host, port, timeout=_CONNECT_SECONDS, context=context
            )
        return http.client.HTTPConnection(host, port, timeout=_CONNECT_SECONDS)


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in response:
        text = line.decode("utf-8", "replace").strip()
        if not text.startswith("data:"):
            continue
        data = text[5:].strip()
        if data == "[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise ChatError(event["error"].get("message") or "the server failed")
        yield event


def _refusal(status: int, body: bytes) -> str:
    try:
        return f"{status}: {json.loads(body)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"the server answered {status}"


class Terminal:
    """One conversation with a person. `read` asks for a line and raises EOFError at the end."""

    def __init__(self, server: Server, talk: Conversation, read: Callable[[str], str]):
        self._server, self.talk, self._read = server, talk, read

    def run(self) -> None:
        """Talk until the person leaves."""
        click.echo("Type a question, /help for commands, Ctrl-D to leave.")
        while (line := self._line()) is not None:
            if not line.strip():
                continue
            if line.startswith("/"):
                if not self._command(line):
                    return
                continue
            self.talk.messages.append({"role": "user", "content": line})
            self._answer()

    def _line(self) -> str | None:
        lines: list[str] = []
        try:
            while True:
                lines.append(self._read("… " if lines else "> "))
                if not lines[-1].endswith("\\"):
                    return "\n".join(lines)
                lines[-1] = lines[-1][:-1]
        except KeyboardInterrupt:
            click.echo()
            return ""
        except EOFError:
            click.echo()
            return None

    def _command(self, line: str) -> bool:
        """Obey a command; whether to go on."""
        word, _, rest = line.strip().partition(" ")
        talk = self.talk
        match word:
            case "/quit" | "/exit":
                return False
            case "/think":
                talk.thinking = True
            case "/nothink":
                talk.thinking = False
            case "/effort":
                talk.effort = rest.strip() or None
            case "/system":
                talk.system = rest.strip() or None
            case "/undo":
                talk.undo()
            case "/clear":
                talk.messages.clear()
            case "/history":
                for message in talk.messages:
                    click.echo(f"{message['role']}: {message['content']}")
            case "/help":
                click.echo(_HELP)
            case _:
                click.echo(f"there is no {word}; /help lists what there is", err=True)
        return True

    def _answer(self) -> None:
        """Write an answer as it comes, and remember it; Ctrl-C keeps what has come."""
        texts: dict[str, list[str]] = {"reasoning_content": [], "content": []}
        usage: dict[str, Any] | None = None
        stopped = False
        events = self._server.answer(self.talk.body())
        try:
            with closing(events):
                for event in events:
                    usage = event.get("usage") or usage
                    for choice in event["choices"]:
                        self._show(choice["delta"], texts)
        except KeyboardInterrupt:
            stopped = True
        except ChatError as error:
            click.echo(f"\n{error}", err=True)
            if not any(texts.values()):
                self.talk.undo()
                return
        message = {"role": "assistant", "content": "".join(texts["content"])}
        if texts["reasoning_content"]:
            message["reasoning_content"] = "".join(texts["reasoning_content"])
        self.talk.messages.append(message)
        click.echo("\n[stopped]" if stopped else f"\n{_figures(usage)}", err=stopped)

    @staticmethod
    def _show(delta: dict[str, Any], texts: dict[str, list[str]]) -> None:
        for name, known in texts.items():
            piece = delta.get(name)
            if not piece:
                continue
            if name == "content" and not known and texts["reasoning_content"]:
                click.echo("\n")
            known.append(piece)
            click.secho(piece, nl=False, dim=name == "reasoning_content")


def _figures(usage: dict[str, Any] | None) -> str:
    if not usage:
        return ""
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return (
        f"[{usage['prompt_tokens']} tokens in, {cached} of them cached; "
        f"{usage['completion_tokens']} out]"
    )


@click.command()
@click.option(
    "--url", default="http://127.0.0.1:8000", show_default=True, help="A server's address."
)
@click.option("--api-key", envvar="FOURFOLD_API_KEY", metavar="KEY", help="Its key.")
@click.option("--model", help="The model's name there.")
@click.option("--system", help="Instructions for the whole conversation.")
@click.option("--temperature", type=float, help="0 is greedy.")
@click.option("--max-tokens", type=click.IntRange(1), help="Longest answer.")
@click.option("--no-think", is_flag=True, help="Begin without thinking.")
def chat(
    url: str,
    api_key: str | None,
    model: str | None,
    system: str | None,
    temperature: float | None,
    max_tokens: int | None,
    no_think: bool,
) -> None:
    """Talk to a model that `fourfold serve` runs."""
    try:
        import readline  # noqa: F401  # input() then has a history and can be edited
    except ImportError:
        click.echo("(without readline there is no history of what was typed)", err=True)
    given = {"temperature": temperature, "max_tokens": max_tokens}
    fields = {name: value for name, value in given.items() if value is not None}
    talk = Conversation(model, not no_think, None, system, fields)
    key = api_key.split()[0] if api_key else None
    Terminal(Server(url, key), talk, input).run()
