"""`fourfold serve`: the model behind HTTP."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from fourfold import __version__
from fourfold.cli.config_file import read_config
from fourfold.cli.options import engine_options, llm_arguments, say_no_effect, stacked
from fourfold.cli.progress import LoadReport
from fourfold.core.errors import ConfigError
from fourfold.core.log import LOG_FORMATS, Log
from fourfold.weights.locate import locate

if TYPE_CHECKING:
    from fourfold.server.serving import Serving
    from fourfold.server.settings import ServerSettings

_ALWAYS_ON = "this model's answers are always read so"
_NO_EFFECT: Mapping[str, str] = {
    "tool_call_parser": _ALWAYS_ON,
    "reasoning_parser": _ALWAYS_ON,
    "enable_auto_tool_choice": _ALWAYS_ON,
    "tokenizer_mode": "the checkpoint's tokenizer.json is read as it is",
    "disable_log_requests": "the log never holds what a request says",
}
_PARSERS = ("deepseek-v4", "deepseekv4", "deepseek_v4", "auto")
_LOCAL = ("127.0.0.1", "::1", "localhost")

server_options = stacked(
    [
        click.option(
            "--host", default="127.0.0.1", show_default=True, envvar="FOURFOLD_HOST",
            help="Address to listen on; 0.0.0.0 is all of them.",
        ),
        click.option(
            "--port", "--server-port", type=click.IntRange(0, 65535), default=8000,
            show_default=True, envvar="FOURFOLD_PORT", help="Port; 0 takes a free one.",
        ),
        click.option(
            "--api-key", "api_keys", multiple=True, envvar="FOURFOLD_API_KEY", metavar="KEY",
            help="A key that requests must carry; repeatable.",
        ),
        click.option(
            "--served-model-name", "served_model_names", multiple=True, metavar="NAME",
            envvar="FOURFOLD_SERVED_MODEL_NAME", help="Name in requests; repeatable.",
        ),
        click.option(
            "--chat-profile", type=click.Choice(["preview", "official"]),
            help="Chat format; the checkpoint decides if not given.",
        ),
        click.option(
            "--max-waiting-requests", "--max-queued-requests", type=click.IntRange(0), default=512,
            show_default=True, help="Sequences that may wait beyond --max-num-seqs.",
        ),
        click.option(
            "--max-waiting-tokens", type=click.IntRange(1),
            help="Prompt tokens that may wait.  [default: four contexts, at least 1048576]",
        ),
        click.option(
            "--max-request-bytes", type=click.IntRange(1), default=32 << 20, show_default=True,
            help="Longest body.",
        ),
        click.option(
            "--drain-timeout", type=click.FloatRange(0), default=30.0, show_default=True,
            envvar="FOURFOLD_DRAIN_TIMEOUT", help="Seconds to finish in after SIGTERM.",
        ),
        click.option(
            "--watchdog-timeout", type=click.FloatRange(0, min_open=True), default=600.0,
            show_default=True, help="Seconds a step may take before the engine counts as stuck.",
        ),
        click.option(
            "--allowed-origins", multiple=True, metavar="ORIGIN",
            help="Origin whose pages may call; repeatable, or a JSON list.  [default: none]",
        ),
        click.option("--no-ui", is_flag=True, help="Serve no page at /."),
        click.option(
            "--log-format", type=click.Choice(LOG_FORMATS), default="text", show_default=True,
            envvar="FOURFOLD_LOG_FORMAT", help="Form of log lines.",
        ),
        click.option("--seed", type=click.IntRange(0), default=0, show_default=True,
            help="Of requests without a seed of their own.",
        ),
        click.option(
            "--config", callback=read_config, is_eager=True, expose_value=False,
            envvar="FOURFOLD_CONFIG", metavar="FILE", help="Flags from a .yaml, .toml or .json file.",
        ),
        click.option("--tool-call-parser", hidden=True),
        click.option("--reasoning-parser", hidden=True),
        click.option("--enable-auto-tool-choice", is_flag=True, hidden=True),
        click.option("--tokenizer-mode", hidden=True),
        click.option("--disable-log-requests", is_flag=True, hidden=True),
    ]
)  # fmt: skip


@click.command()
@engine_options
@server_options
def serve(**flags: Any) -> None:
    """Serve MODEL over HTTP, with OpenAI's API.

    MODEL is a directory, org/name[@revision], or nano, the built-in model; nano if left out.
    """
    from fourfold.core.config import EngineConfig
    from fourfold.engine.client import ProcessEngineClient
    from fourfold.engine.watchdog import WatchdogLimits
    from fourfold.llm import AsyncLLM
    from fourfold.llm.engine_process import ENGINE_PROCESS
    from fourfold.server.run import bind, run
    from fourfold.server.serving import Serving
    from fourfold.text.generation import read_generation_defaults

    log = Log(flags["log_format"])
    settings = _settings(flags)
    _expect_parsers(flags)
    say_no_effect(flags, _NO_EFFECT)
    arguments = llm_arguments(flags, flags["seed"])
    listener = bind(flags["host"], flags["port"])
    with listener:
        llm = AsyncLLM(**arguments, chat_profile=flags["chat_profile"])
        config: EngineConfig = llm.launch.config
        location = locate(config.model)
        report = LoadReport(log.lines)
        engine = ProcessEngineClient(
            llm.launch,
            replace(WatchdogLimits(), step=flags["watchdog_timeout"]),
            entry=ENGINE_PROCESS,
        )
        serving = Serving(
            settings,
            engine,
            llm.tokenizer,
            llm.chat_profile.profile,
            read_generation_defaults(location.directory),
            log,
            location.name,
            on_progress=report,
            grammars=True,
        )
        port = listener.getsockname()[1]
        log.lines(f"fourfold {__version__}: {location.name} on http://{_url(flags['host'], port)}")
        log.lines(f"chat format: {llm.chat_profile.profile.value}, {llm.chat_profile.reason}")
        if flags["host"] not in _LOCAL and not settings.api_keys:
            log.lines(_WARNING.format(host=flags["host"]))

        def ready() -> None:
            _announce(log, serving)
            log.lines("ready. Try:\n" + _curl(flags["host"], port, serving.names[0], settings))

        status = run(serving, listener, ready)
    if status:
        raise click.exceptions.Exit(status)


_WARNING = """\
############################################################################
WARNING: --host {host} without --api-key. Everybody who can reach this
machine can use the model, as much as they like. Give --api-key, or listen on
127.0.0.1 and put something in front that asks who is there.
############################################################################"""


def _settings(flags: Mapping[str, Any]) -> ServerSettings:
    from fourfold.server.settings import ServerSettings

    size = flags["max_request_bytes"]
    return ServerSettings(
        served_model_names=tuple(flags["served_model_names"]),
        api_keys=tuple(flags["api_keys"]),
        allowed_origins=_origins(flags["allowed_origins"]),
        max_waiting_requests=flags["max_waiting_requests"],
        max_waiting_tokens=flags["max_waiting_tokens"],
        max_request_bytes=size,
        max_bodies_bytes=max(8 * size, 256 << 20),
        drain_timeout=flags["drain_timeout"],
        ui=not flags["no_ui"],
    )


def _origins(given: Sequence[str]) -> tuple[str, ...]:
    """The origins; vLLM takes one JSON list of them."""
    if len(given) == 1 and given[0].startswith("["):
        try:
            found = json.loads(given[0])
        except ValueError as error:
            raise ConfigError(f"--allowed-origins is not valid JSON: {error}") from None
        if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
            raise ConfigError("--allowed-origins must be a list of texts")
        given = found
    return tuple(given)


def _expect_parsers(flags: Mapping[str, Any]) -> None:
    for name in ("tool_call_parser", "reasoning_parser", "tokenizer_mode"):
        value = flags[name]
        if value is not None and value not in _PARSERS:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} must be deepseek_v4, the only one there is, found {value!r}")


def _announce(log: Log, serving: Serving) -> None:
    log.lines("\n".join([*serving.info.notes, *serving.info.capacity, *serving.bounds()]))


def _url(host: str, port: int) -> str:
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{reachable}]:{port}" if ":" in reachable else f"{reachable}:{port}"


def _curl(host: str, port: int, name: str, settings: ServerSettings) -> str:
    body = {"model": name, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 200}
    key = "-H 'Authorization: Bearer YOUR_KEY' " if settings.api_keys else ""
    return (
        f"  curl http://{_url(host, port)}/v1/chat/completions "
        f"-H 'Content-Type: application/json' {key}-d {shlex.quote(json.dumps(body))}"
    )
