"""What /metrics tells Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from gptdist.serve.engine import Engine, Job

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """A registry of its own, so that several servers may live in one process."""

    def __init__(self, engine: Engine | None):
        self.registry = CollectorRegistry()
        own = dict(registry=self.registry)
        self.requests = Counter("gptdist_requests", "Answers by path and status", ["path", "status"], **own)
        self.prompt_tokens = Counter("gptdist_prompt_tokens", "Tokens of prompts", **own)
        self.cached_tokens = Counter("gptdist_cached_prompt_tokens", "Of these, found in the cache", **own)
        self.generated_tokens = Counter("gptdist_generated_tokens", "Tokens generated", **own)
        self.first_token = Histogram("gptdist_first_token_seconds", "From arrival to the first token", buckets=SECONDS,
                                     **own)
        self.duration = Histogram("gptdist_request_seconds", "From arrival to the end", buckets=SECONDS, **own)
        if engine is not None:
            for name, help, value in (
                ("rows_running", "Rows computed together", lambda: len(engine.rows)),
                ("rows_waiting", "Rows in the queue", lambda: len(engine.waiting)),
                ("cache_pages", "Pages of the cache", lambda: engine.pool.n_pages),
                ("cache_pages_used", "Pages that rows hold", lambda: engine.n_pages_used),
                ("engine_steps", "Steps of the engine", lambda: engine.steps),
                ("engine_failures", "Steps that failed", lambda: engine.failures),
            ):
                Gauge(f"gptdist_{name}", help, **own).set_function(value)

    def count_job(self, job: Job, now: float) -> None:
        self.prompt_tokens.inc(job.n_prompt_tokens)
        self.cached_tokens.inc(job.n_cached)
        self.generated_tokens.inc(job.n_tokens)
        if job.first_token is not None:
            self.first_token.observe(job.first_token - job.submitted)
        self.duration.observe(now - job.submitted)

    def text(self) -> bytes:
        return generate_latest(self.registry)
