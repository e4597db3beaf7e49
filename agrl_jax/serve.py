"""Serves a judge over HTTP.

    python -m agrl_jax.serve --checkpoint=my_judge --port=8000

It needs the extra `serve`: pip install 'agrl_jax[serve]'. The checkpoint is what `agrl_jax.judge` takes.

    POST /judge     a pair {"query": ..., "title": ...} with what else is known of the item (description, brand, color,
                    category, price) and an `id` of your own, or a list of pairs. The answer is a judgement, or a list
                    of them: tier, probs, steps, consistent, response and, where a pair cannot be judged, error
    GET  /health    200 as soon as the judge answers
    GET  /metrics   for Prometheus
    GET  /rules     the rule book

Pairs of requests that come together are judged together. Bad input is answered with a status of 400 to 422 and
{"error": ...}, a request that is too large with 413, and one too many with 503. On SIGTERM or Ctrl-C the server takes
no more requests, answers those that it has accepted, and ends with exit code 0.
"""

from __future__ import annotations

import signal
import socket
import sys

from absl import flags

from agrl_jax.judging import checkpoint_flags
from agrl_jax.runtime.config import ConfigError, exit_with, parse_flags
from agrl_jax.runtime.memory import with_huge_pages


def _define_flags() -> None:
    checkpoint_flags.define(batch_size=16)
    flags.adopt_module_key_flags(checkpoint_flags)  # so that --help shows them
    flags.DEFINE_string("host", "127.0.0.1", "The address to listen on; 0.0.0.0 or :: for all.")
    flags.DEFINE_integer("port", 8000, "The port; 0: any that is free.", lower_bound=0, upper_bound=65535)
    flags.DEFINE_float("window_ms", 5.0, "How long a pair waits for others, in milliseconds.", lower_bound=0)
    flags.DEFINE_integer("max_pairs", 256, "Pairs that one request may hold.", lower_bound=1)
    flags.DEFINE_integer("max_bytes", 1 << 20, "Bytes that a request's body may hold.", lower_bound=1)
    flags.DEFINE_integer("max_waiting", 4096, "Pairs that may wait for an answer, of all requests.", lower_bound=1)
    flags.DEFINE_integer("grace_s", 60, "Seconds in which accepted requests are answered at the end.", lower_bound=1)


def run(values: flags.FlagValues) -> None:
    """Serves until it is told to stop."""
    if values.max_pairs > values.max_waiting:
        raise ConfigError(f"--max_pairs={values.max_pairs} should be at most --max_waiting={values.max_waiting}")
    try:
        import uvicorn

        from agrl_jax.judging.serving import Limits, Service
    except ModuleNotFoundError as error:
        raise ConfigError(f"serving needs {error.name}: pip install 'agrl_jax[serve]'") from None
    from agrl_jax.runtime import processes
    from agrl_jax.runtime.console import say

    processes.require_one("serves")
    listening = _bind(values.host, values.port)  # before a model is loaded
    judge = checkpoint_flags.load(values, values.use_cuts)
    judge.warm_up()
    limits = Limits(values.max_pairs, values.max_bytes, values.max_waiting, values.window_ms / 1000)
    service = Service(judge, limits)

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            host, port = listening.getsockname()[:2]
            say(f"serving {values.checkpoint} on http://{f'[{host}]' if ':' in host else host}:{port}")
            sys.stdout.flush()

    config = uvicorn.Config(
        service.application(), log_level="warning", access_log=False, timeout_graceful_shutdown=values.grace_s
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # the server raises them once more when it has ended
    Server(config).run([listening])
    say(f"stopped: {service.accepted:,} requests accepted, {service.answered:,} answered")


def _bind(host: str, port: int) -> socket.socket:
    """A socket at an address. Raises ConfigError where there is none, or it is taken."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise ConfigError(f"--host={host} --port={port}: {error.strerror or error}; name another") from error
    return bound


def main(argv: list[str]) -> None:
    """Exit code 2 for bad input."""
    _define_flags()
    parse_flags(argv)
    from agrl_jax.judging.files import USER_ERRORS

    try:
        run(flags.FLAGS)
    except USER_ERRORS as error:
        exit_with(error)


if __name__ == "__main__":
    with_huge_pages()
    main(sys.argv)
