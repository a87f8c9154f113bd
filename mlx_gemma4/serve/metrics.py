"""What the server does, for Prometheus."""

import mlx.core as mx
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mlx_gemma4.reply.reply import Stats
from mlx_gemma4.serve.resident import Resident

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
RATES = (1, 2, 5, 10, 20, 40, 80, 160, 320, 640)


class Metrics:
    """Counts; what is true at the moment is read when it is asked for."""

    def __init__(self, resident: Resident):
        self.resident = resident
        self.registry = own = CollectorRegistry()
        name = "mlx_gemma4_"
        self.requests = Counter(name + "requests", "Requests, by path and status.", ["path", "status"], registry=own)
        self.prompt_tokens = Counter(name + "prompt_tokens", "Tokens of prompts.", registry=own)
        self.cached_tokens = Counter(name + "cached_tokens", "Of these, not read again.", registry=own)
        self.reply_tokens = Counter(name + "reply_tokens", "Tokens of replies.", registry=own)
        self.drafted_tokens = Counter(name + "drafted_tokens", "Tokens drafted.", registry=own)
        self.accepted_tokens = Counter(name + "accepted_tokens", "Of these, accepted.", registry=own)
        self.first_token = Histogram(name + "first_token_seconds", "To it.", buckets=SECONDS, registry=own)
        self.rate = Histogram(name + "tokens_per_second", "Of each reply.", buckets=RATES, registry=own)
        for label, help, value in (
            ("queued", "Replies that wait for a row.", lambda: resident.states()[0]),
            ("reading", "Prompts that are being read.", lambda: resident.states()[1]),
            ("rows", "Replies that are being written.", lambda: resident.states()[2]),
            ("memory_bytes", "MLX's memory in use.", mx.get_active_memory),
            ("store_bytes", "What has been read and is kept.", lambda: resident.store.nbytes),
        ):
            Gauge(name + label, help, registry=own).set_function(value)

    def count(self, stats: Stats) -> None:
        """One reply that has ended."""
        self.prompt_tokens.inc(stats.prompt_tokens)
        self.cached_tokens.inc(stats.cached_tokens)
        self.reply_tokens.inc(stats.generation_tokens)
        self.drafted_tokens.inc(stats.drafted_tokens)
        self.accepted_tokens.inc(stats.accepted_tokens)
        self.first_token.observe(stats.time_to_first_token)
        if stats.generation_tokens > 1:  # one token alone has no rate
            self.rate.observe(stats.generation_tps)

    def text(self) -> bytes:
        return generate_latest(self.registry)
