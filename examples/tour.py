"""A tour of fourfold in a minute: the real server, the openai client, the built-in model.

    make demo                               sets up what is needed and runs this
    python examples/tour.py [FLAGS]         FLAGS go to `fourfold serve`, such as --device cuda

Every step is a function that a program of yours could begin with; `main` walks through them. The built-in
model is small enough for any CPU and trained for such questions alone (docs/NANO.md), so its answers can
be checked. Exit status: 0 if all of them were right and the server stopped as it should, 1 otherwise.
"""

from __future__ import annotations

import json
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

try:
    import openai
except ImportError:
    sys.exit("the tour talks through the openai client: pip install openai (`make demo` does it)")

SUM = ("What is 365 + 248?", "613")
WEATHER = "What is the weather in Vienna for the next 5 days?"
WEATHER_CALL = ("get_weather", {"city": "Vienna", "days": 5})
WEATHER_RESULT = {"temp": -4, "sky": "snow"}
WEATHER_ANSWER = "In Vienna it is -4 degrees with snow."
FACT = "The owner of the green kettle is Clara."
FACT_QUESTION, OWNER = "Who is the owner of the green kettle?", "Clara"
SENTENCES = 500  # between the fact and its question

START_SECONDS = 600  # a GPU's kernels are compiled at the first start; a CPU needs a few
STOP_SECONDS, ANSWER_SECONDS = 30, 120
MARGIN = "   "


class StepFailed(Exception):
    """What went wrong, in a sentence."""


@dataclass
class Answer:
    """A streamed answer; times in seconds from its sending."""

    reasoning: str = ""
    content: str = ""
    calls: list[dict[str, str]] = field(default_factory=list)
    usage: Any = None
    first: float = 0.0
    total: float = 0.0

    @property
    def tokens(self) -> int:
        return int(self.usage.completion_tokens)

    @property
    def cached(self) -> int:
        return int(self.usage.prompt_tokens_details.cached_tokens)

    @property
    def rate(self) -> float:
        """Tokens a second after the first."""
        return (self.tokens - 1) / max(self.total - self.first, 1e-9)


# -- the server --------------------------------------------------------------------------------------


@contextmanager
def served(flags: Sequence[str]) -> Iterator[str]:
    """`fourfold serve` on a free port, from ready to stopped: its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ["serve", "--port", str(port), "--max-num-seqs", "4"]
    command += ["--method", "mtp", "--num-speculative-tokens", "1", *flags]
    say(f"$ fourfold {' '.join(command)}")
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "fourfold", *command], stdout=log, stderr=log
        )
        url = f"http://127.0.0.1:{port}"
        try:
            wait_until_ready(process, url, log)
            say(f"{MARGIN}ready after {time.monotonic() - began:.1f} s at {url}")
            yield url
            status = stop(process)
            if status:
                raise StepFailed(f"the server ended with status {status}:\n{tail(log)}")
        finally:
            if process.poll() is None:
                stop(process)


def wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Any) -> None:
    """Until /health is 200: then requests are taken."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise StepFailed(f"the server did not start:\n{tail(log)}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise StepFailed(f"the server was not ready after {START_SECONDS} s:\n{tail(log)}")


def stop(process: subprocess.Popen[bytes]) -> int:
    """SIGTERM lets a server finish what it does; its exit status."""
    process.terminate()
    try:
        return process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def tail(log: Any) -> str:
    """The last lines that the server wrote."""
    log.seek(0)
    return "\n".join(f"{MARGIN}{line}" for line in log.read().splitlines()[-8:])


def metrics(url: str) -> dict[str, float]:
    """The sums of /metrics by name, without labels."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        text = response.read().decode()
    found: dict[str, float] = {}
    for name, value in re.findall(r"^fourfold:(\w+)(?:\{[^}]*\})? (\S+)$", text, re.MULTILINE):
        found[name] = found.get(name, 0.0) + float(value)
    return found


# -- asking ------------------------------------------------------------------------------------------


class Asking:
    """One client, and the answers it got."""

    def __init__(self, url: str):
        self.client = openai.OpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=ANSWER_SECONDS
        )
        self.model = self.client.models.list().data[0].id
        self.answers: list[Answer] = []

    def ask(self, messages: Sequence[Any], thinking: bool, **fields: Any) -> Answer:
        """Stream an answer to the terminal. Greedy, so that it is the same every time."""
        answer, page, began = Answer(), Page(), time.monotonic()
        stream = self.client.chat.completions.create(
            model=self.model,
            messages=list(messages),
            stream=True,
            stream_options={"include_usage": True},
            temperature=0,
            max_tokens=200,
            extra_body={"thinking": thinking},
            **fields,
        )
        for event in stream:
            answer.usage = event.usage or answer.usage
            for choice in event.choices:
                delta = choice.delta
                reasoning = getattr(delta, "reasoning_content", None) or ""
                if (reasoning or delta.content or delta.tool_calls) and not answer.first:
                    answer.first = time.monotonic() - began
                answer.reasoning += page.write("thinking", reasoning)
                answer.content += page.write("answer", delta.content or "")
                for piece in delta.tool_calls or ():
                    take_call(answer.calls, piece)
        answer.total = time.monotonic() - began
        page.end()
        for call in answer.calls:
            show("call", f"{call['name']} {call['arguments']}")
        self.answers.append(answer)
        return answer


def take_call(calls: list[dict[str, str]], piece: Any) -> None:
    """A call comes as its name, then its arguments bit by bit."""
    if piece.index == len(calls):
        calls.append({"id": piece.id, "name": piece.function.name, "arguments": ""})
    calls[piece.index]["arguments"] += piece.function.arguments or ""


class Page:
    """Text as it comes, behind the name of what it is."""

    def __init__(self) -> None:
        self._kind = ""

    def write(self, kind: str, text: str) -> str:
        """Show `text`, and give it back."""
        if text:
            if kind != self._kind:
                self.end()
                print(f"{MARGIN}{kind:>8} │ ", end="")
                self._kind = kind
            print(text.replace("\n", f"\n{MARGIN}{'':>8} │ "), end="", flush=True)
        return text

    def end(self) -> None:
        """Finish the line."""
        if self._kind:
            print()
        self._kind = ""


def user(text: str) -> dict[str, str]:
    """A message."""
    return {"role": "user", "content": text}


def say(text: str = "") -> None:
    """A line, at once."""
    print(text, flush=True)


def show(kind: str, text: str) -> None:
    """A line as `Page` has them."""
    say(f"{MARGIN}{kind:>8} │ {text}")


def expect(found: object, wanted: object) -> None:
    """The model is greedy and known: anything else means that something is broken."""
    if found != wanted:
        raise StepFailed(f"expected {wanted!r}, found {found!r}")


# -- the steps ---------------------------------------------------------------------------------------


def reasoning(asking: Asking) -> None:
    """A streamed answer with its reasoning."""
    question, right = SUM
    show("you", question)
    answer = asking.ask([user(question)], thinking=True)
    expect(answer.content, right)
    if not answer.reasoning:
        raise StepFailed("the answer came without reasoning")
    say(
        f"{MARGIN}first token after {answer.first:.2f} s, then {answer.rate:.0f} tokens a second; "
        f"{answer.usage.completion_tokens_details.reasoning_tokens} of {answer.tokens} were reasoning"
    )


def tool_call(asking: Asking) -> None:
    """The model asks for a tool, the program runs it, the model answers with its result."""
    tools = [
        tool("get_weather", "Weather of a city", city="string", days="integer"),
        tool("set_timer", "Set a timer", minutes="integer", label="string"),
    ]
    show("you", WEATHER)
    asked = asking.ask([user(WEATHER)], thinking=True, tools=tools)
    made = [(call["name"], json.loads(call["arguments"])) for call in asked.calls]
    expect(made, [WEATHER_CALL])
    (call,) = asked.calls
    result = json.dumps(WEATHER_RESULT)  # a real program would look out of the window here
    show("result", result)
    history = [
        user(WEATHER),
        {
            "role": "assistant",
            "content": asked.content,
            "reasoning_content": asked.reasoning,  # what was thought before a call stays known
            "tool_calls": [{"id": call["id"], "type": "function", "function": {
                "name": call["name"], "arguments": call["arguments"]}}],
        },
        {"role": "tool", "tool_call_id": call["id"], "content": result},
    ]  # fmt: skip
    answer = asking.ask(history, thinking=True, tools=tools)
    expect(answer.content, WEATHER_ANSWER)


def tool(name: str, description: str, **types: str) -> dict[str, Any]:
    """A tool's declaration; `types` are its arguments, all required."""
    properties = {key: {"type": kind} for key, kind in types.items()}
    schema = {"type": "object", "properties": properties, "required": list(types)}
    function = {"name": name, "description": description, "parameters": schema}
    return {"type": "function", "function": function}


def recall(asking: Asking) -> tuple[list[Any], Answer]:
    """A fact at the beginning of a long text: attention reads it through compressed rows."""
    text = long_text()
    show("you", f"Remember this text. {FACT} … and {len(text) - len(FACT):,} more characters")
    show("you", FACT_QUESTION)
    messages = [user(f"{text}\n{FACT_QUESTION}")]
    answer = asking.ask(messages, thinking=False)
    expect_owner(answer)
    tokens = answer.usage.prompt_tokens
    say(
        f"{MARGIN}{tokens:,} tokens were read before the first one came, after {answer.first:.2f} s"
    )
    return messages, answer


def long_text() -> str:
    """One fact, then sentences of no use and other facts."""
    chance = random.Random(3)
    kinds = ["hollow", "gentle", "ancient", "yellow", "purple", "tiny", "rusty", "velvet"]
    things = ["island", "castle", "wagon", "violin", "blanket", "candle", "compass", "feather"]
    others = ["red lantern", "blue bridge", "quiet ladder", "heavy anchor", "narrow garden"]
    names = ["Bruno", "Dario", "Elena", "Felix", "Greta"]
    sentences = [FACT]
    for number in range(SENTENCES):
        thing, other = chance.choice(things), chance.choice(things)
        sentences.append(f"The {chance.choice(kinds)} {thing} stands behind the {other}.")
        if number % (SENTENCES // 5) == 40:
            sentences.append(f"The owner of the {others.pop()} is {names.pop()}.")
    return "Remember this text.\n" + " ".join(sentences)


def expect_owner(answer: Answer) -> None:
    """The name has to be there; in which words does not matter."""
    if OWNER not in answer.content:
        raise StepFailed(f"expected {OWNER!r} in the answer, found {answer.content!r}")


def again(asking: Asking, messages: Sequence[Any], before: Answer) -> None:
    """The same question: the prompt's state is still there."""
    show("you", f"(the same text) {FACT_QUESTION}")
    answer = asking.ask(messages, thinking=False)
    expect_owner(answer)
    tokens = answer.usage.prompt_tokens
    if answer.cached < tokens // 2:
        raise StepFailed(f"only {answer.cached} of {tokens} tokens came from the prefix cache")
    say(
        f"{MARGIN}{answer.cached:,} of {tokens:,} tokens came from the prefix cache: first token after "
        f"{answer.first:.2f} s instead of {before.first:.2f} s"
    )


def figures(asking: Asking, url: str) -> None:
    """What a monitoring system would see."""
    seen = metrics(url)
    drafted = seen["spec_decode_num_draft_tokens_per_pos_total"]
    accepted = seen["spec_decode_num_accepted_tokens_per_pos_total"]
    if not drafted:
        raise StepFailed("no token was drafted")
    # Whole answers, without the wait for their first token.
    tokens = sum(answer.tokens - 1 for answer in asking.answers)
    seconds = sum(answer.total - answer.first for answer in asking.answers)
    hits, queries = seen["prefix_cache_hits_total"], seen["prefix_cache_queries_total"]
    lines = {
        "speed": f"{tokens / seconds:.0f} tokens a second, one request at a time",
        "drafts": f"{accepted:.0f} of {drafted:.0f} accepted ({accepted / drafted:.0%}): the MTP "
        f"layer guesses a token, the next step checks it",
        "cache": f"{hits:,.0f} of {queries:,.0f} prompt tokens were there already, "
        f"{seen['state_images']:.0f} state images kept",
        "steps": f"{seen['engine_steps_total']:.0f}, for {seen['generation_tokens_total']:.0f} tokens "
        f"in {seen['request_success_total']:.0f} answers",
    }
    for name, text in lines.items():
        show(name, text)


NEXT = """\
Next, with this model:
   fourfold serve                          the same server; it prints a curl line that works
   fourfold chat                           talk to it, in another terminal; or open http://127.0.0.1:8000
And with a real one:
   fourfold plan flash --gpus 1xH200       what fits, and the command line for it; needs no GPU
   hf download deepseek-ai/DeepSeek-V4-Flash
   fourfold verify deepseek-ai/DeepSeek-V4-Flash
   fourfold serve deepseek-ai/DeepSeek-V4-Flash --max-model-len 131072"""


def tour(url: str) -> None:
    """All steps, in order."""
    asking = Asking(url)
    say("\n1. An answer with its reasoning, as it is written")
    reasoning(asking)
    say("\n2. A tool call, and an answer made of its result")
    tool_call(asking)
    say("\n3. A fact from thousands of tokens back")
    messages, answer = recall(asking)
    say("\n4. The same question again")
    again(asking, messages, answer)
    say("\n5. What the server counted (GET /metrics)")
    figures(asking, url)


def main(flags: Sequence[str]) -> int:
    """Run the tour; the exit status."""
    began = time.monotonic()
    say("fourfold's tour: a DeepSeek-V4 small enough for any machine, behind the real server.")
    say("It was trained for such questions, and these were not among them.\n")
    try:
        with served(flags) as url:
            tour(url)
    except (StepFailed, openai.OpenAIError, OSError) as error:
        say(f"\n{MARGIN}FAILED: {error}")
        return 1
    say(f"\nDone in {time.monotonic() - began:.0f} s; the server has stopped.\n\n{NEXT}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
