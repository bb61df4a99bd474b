"""What /metrics shows: vLLM's names behind our prefix, and a few that only this engine has.

Contract: label sets are fixed when the server starts, so that no request can add a series. Counts that
the engine keeps are taken from its latest `EngineStats`; a scrape never waits for a long step. It does
not know HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from fourfold.core.client import EngineClient, EngineState, EngineStats
from fourfold.core.errors import FourfoldError

PREFIX = "fourfold:"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
REASONS = ("stop", "length", "tool_calls", "abort", "error")
REJECTIONS = ("requests", "tokens", "bodies", "connections", "starting", "draining", "dead")
# Beginning of the engine's sentence -> label.
MISSES = {
    "prefix caching is off": "disabled",
    "prompt_logprobs": "prompt_logprobs",
    "the tokens from": "not_cached",
    "no state image between": "no_image",
    "no state image below": "no_image",
}
_MISS_LABELS = (*dict.fromkeys(MISSES.values()), "other")
_STATS_TIMEOUT = 1.0
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 640, 2560)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5, 20)
_TOKENS = (1, 10, 50, 100, 500, 1000, 5000, 10_000, 50_000, 100_000, 500_000, 1_000_000)


class Metrics:
    """One server's metrics, in a registry of their own."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._stats = EngineStats()
        self._asking: asyncio.Task[EngineStats] | None = None
        self.registry = CollectorRegistry(auto_describe=False)
        counter, histogram = self._counter, self._histogram
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests that were begun.")
        self.generation_tokens = counter("generation_tokens", "Tokens generated.")
        self.cache_queries = counter("prefix_cache_queries", "Prompt tokens looked up.")
        self.cache_hits = counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._misses = counter(
            "prefix_cache_misses", "Prompts not wholly cached, by reason.", "reason"
        )
        self._success = counter("request_success", "Answers by how they ended.", "finished_reason")
        self._rejected = counter(
            "request_rejected", "Requests refused for want of room, by reason.", "reason"
        )
        self._nonfinite = counter(
            "nonfinite_logits", "Answers ended because numbers were not finite."
        )
        self.first_token = histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", _SECONDS
        )
        self.between_tokens = histogram(
            "inter_token_latency_seconds", "Between two tokens of an answer.", _BETWEEN
        )
        self.end_to_end = histogram(
            "e2e_request_latency_seconds", "From a request's arrival to its end.", _SECONDS
        )
        self.prompt_size = histogram("request_prompt_tokens", "Prompt tokens a request.", _TOKENS)
        self.answer_size = histogram(
            "request_generation_tokens", "Generated tokens a request.", _TOKENS
        )
        for label in REASONS:
            self._success.labels(label)
        for label in REJECTIONS:
            self._rejected.labels(label)
        for label in _MISS_LABELS:
            self._misses.labels(label)
        self.registry.register(self)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Iterable[float]) -> Histogram:
        return Histogram(PREFIX + name, text, registry=self.registry, buckets=tuple(buckets))

    def rejected(self, reason: str) -> None:
        """A request was refused for want of room."""
        self._rejected.labels(reason if reason in REJECTIONS else "requests").inc()

    def ended(self, reason: str, nonfinite: bool = False) -> None:
        """An answer ended."""
        self._success.labels(reason if reason in REASONS else "error").inc()
        if nonfinite:
            self._nonfinite.inc()

    def looked_up(self, prompt_tokens: int, cached: int, miss: str | None) -> None:
        """A prompt met the prefix cache."""
        self.prompt_tokens.inc(prompt_tokens)
        self.cache_queries.inc(prompt_tokens)
        self.cache_hits.inc(cached)
        if miss is not None:
            labels = (label for words, label in MISSES.items() if miss.startswith(words))
            self._misses.labels(next(labels, "other")).inc()

    async def exposition(self) -> bytes:
        """What a scraper reads."""
        if self._engine.health().state in (EngineState.READY, EngineState.DRAINING):
            await self._refresh()
        return generate_latest(self.registry)

    async def _refresh(self) -> None:
        """Ask for counts, once for however many scrapers wait; a long step answers later."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._engine.stats())
        done, _ = await asyncio.wait({self._asking}, timeout=_STATS_TIMEOUT)
        if done:
            try:
                self._stats = self._asking.result()
            except FourfoldError:
                return  # it died meanwhile; the latest counts stand

    def collect(self) -> Iterator[Metric]:
        """The engine's own counts, for the registry."""
        stats, health = self._stats, self._engine.health()
        gauges = {
            "num_requests_running": (stats.num_running, "Sequences running."),
            "num_requests_waiting": (stats.num_waiting, "Sequences waiting in the engine."),
            "kv_cache_usage_perc": (
                stats.pages_used / stats.pages if stats.pages else 0.0,
                "Share of cache pages in use, 0 to 1.",
            ),
            "kv_cache_pages_cached": (stats.pages_cached, "Unused pages that hold a prefix."),
            "state_images": (stats.images, "State images kept."),
            "last_step_age_seconds": (health.step_age, "Since the last step began or ended."),
            "engine_up": (float(health.state is EngineState.READY), "1 if the engine is ready."),
        }
        for name, (value, text) in gauges.items():
            yield GaugeMetricFamily(PREFIX + name, text, value=value)
        counts = {
            "num_preemptions": (stats.num_preemptions, "Sequences that gave up their pages."),
            "engine_steps": (health.num_steps, "Steps of the engine."),
            "step_time_seconds": (health.step_seconds, "Time spent in steps."),
        }
        for name, (value, text) in counts.items():
            yield CounterMetricFamily(PREFIX + name, text, value=value)
        for name, values, text in (
            ("spec_decode_num_draft_tokens_per_pos", stats.drafted, "Drafts by position."),
            (
                "spec_decode_num_accepted_tokens_per_pos",
                stats.accepted,
                "Accepted drafts by position.",
            ),
        ):
            family = CounterMetricFamily(PREFIX + name, text, labels=["position"])
            for position, value in enumerate(values):
                family.add_metric([str(position)], value)
            yield family
