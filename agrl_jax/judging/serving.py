"""A judge as a web application; see `agrl_jax.serve`."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import time
import traceback
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import prometheus_client
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import agrl_jax
from agrl_jax.data.cells import TEXTS, clean, is_unicode
from agrl_jax.hints import did_you_mean
from agrl_jax.judging.engine import Judge, Judgement
from agrl_jax.rulebook.schema import RuleBook

_FIELDS = (*TEXTS, "id")  # of a pair; `id` is handed back
_FAILED = Judgement(error="the judge failed; its log says why")
_Pair = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """The most that the service accepts."""

    rows: int = 256  # pairs of a request
    bytes: int = 1 << 20  # of a request's body
    waiting: int = 4096  # pairs of all requests that are not answered yet
    window_s: float = 0.005  # how long a pair waits for others
    body_s: float = 30.0  # how long the body of a request may take to come


class Batcher:
    """Judges requests together: those that come within the window or while the judge is busy.

    It stops taking requests at `judge.chunk` pairs; the last one may exceed that, since no request is split.
    """

    def __init__(self, judge: Judge, window_s: float) -> None:
        self.waiting = 0  # pairs
        self.calls = 0  # of the judge
        self._judge, self._window_s = judge, window_s
        self._asked: asyncio.Queue[tuple[Sequence[_Pair], asyncio.Future[list[Judgement]]]] = asyncio.Queue()

    async def judge(self, pairs: Sequence[_Pair]) -> list[Judgement]:
        """The judgements of a request's pairs."""
        future = asyncio.get_running_loop().create_future()
        self.waiting += len(pairs)
        self._asked.put_nowait((pairs, future))
        try:
            return await future
        finally:
            self.waiting -= len(pairs)

    async def run(self) -> NoReturn:
        """Judges what is asked, until it is cancelled."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1) as thread:
            while True:
                together = await self._together()
                pairs = [pair for request, _ in together for pair in request]
                self.calls += 1
                try:
                    judged = iter(await loop.run_in_executor(thread, self._judge.judge, pairs))
                except Exception:
                    traceback.print_exc()
                    judged = itertools.repeat(_FAILED)
                for request, future in together:
                    answer = list(itertools.islice(judged, len(request)))
                    if not future.done():  # else nobody waits for it
                        future.set_result(answer)

    async def _together(self) -> list[tuple[Sequence[_Pair], asyncio.Future[list[Judgement]]]]:
        """The next requests: one at least, and those that come within the window."""
        together = [await self._asked.get()]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._window_s):
                while sum(len(pairs) for pairs, _ in together) < self._judge.chunk:
                    together.append(await self._asked.get())
        return together


class Service:
    """The endpoints, and what they count."""

    def __init__(self, judge: Judge, limits: Limits = Limits()) -> None:
        self._judge, self._limits = judge, limits
        self._batcher = Batcher(judge, limits.window_s)
        self.accepted = self.answered = 0  # requests to judge
        self._rules = rules(judge.book)
        self._metrics = prometheus_client.CollectorRegistry()
        make = {"namespace": "agrl_jax", "registry": self._metrics}
        self._requests = prometheus_client.Counter("requests", "Requests to judge, by status.", ["status"], **make)
        self._seconds = prometheus_client.Histogram("request_seconds", "From a request to its answer.", **make)
        self._tiers = prometheus_client.Counter("pairs", "Pairs judged, by tier.", ["tier"], **make)
        self._errors = prometheus_client.Counter("pair_errors", "Pairs that could not be judged.", **make)
        waiting = prometheus_client.Gauge("pairs_waiting", "Pairs that are not answered yet.", **make)
        waiting.set_function(lambda: self._batcher.waiting)
        in_flight = prometheus_client.Gauge("requests_in_flight", "Requests that are not answered yet.", **make)
        in_flight.set_function(lambda: self.accepted - self.answered)
        calls = prometheus_client.Gauge("judge_calls", "Calls of the judge, each for all pairs that came by.", **make)
        calls.set_function(lambda: self._batcher.calls)

    def application(self) -> Starlette:
        """The application, to be served by any ASGI server with one worker."""
        routes = [
            Route("/judge", self._answer, methods=["POST"]),
            Route("/health", self._health),
            Route("/metrics", self._scrape),
            Route("/rules", self._show_rules),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: _refuse}, lifespan=self._running)

    @contextlib.asynccontextmanager
    async def _running(self, _: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(self._batcher.run())
        yield
        task.cancel()

    async def _answer(self, request: Request) -> Response:
        began = time.monotonic()
        try:
            response = JSONResponse(await self._judged(request))
        except HTTPException as error:
            response = _refuse(request, error)
        self._requests.labels(response.status_code).inc()
        self._seconds.observe(time.monotonic() - began)
        return response

    async def _judged(self, request: Request) -> _Pair | list[_Pair]:
        """The judgement of a pair, or those of a list of them."""
        content = parse(await self._body(request))
        pairs = content if isinstance(content, list) else [content]
        if not 0 < len(pairs) <= self._limits.rows:
            said = f"a list should hold 1 to {self._limits.rows} pairs, not {len(pairs)}"
            raise HTTPException(413 if pairs else 400, said)
        for place, pair in enumerate(pairs):
            check(pair, f"pair {place}: " if isinstance(content, list) else "")
        if self._batcher.waiting + len(pairs) > self._limits.waiting:
            said = f"{self._batcher.waiting} pairs are waiting already; try again"
            raise HTTPException(503, said, {"Retry-After": "1"})
        self.accepted += 1
        judged = await self._batcher.judge(pairs)
        self.answered += 1
        answers = [self._judgement(*each) for each in zip(pairs, judged, strict=True)]
        if _FAILED in judged:
            raise HTTPException(500, _FAILED.error)
        if isinstance(content, list):
            return answers
        if "error" in answers[0]:
            raise HTTPException(422, answers[0]["error"])
        return answers[0]

    async def _body(self, request: Request) -> bytes:
        body, limit = bytearray(), self._limits.bytes
        try:
            async with asyncio.timeout(self._limits.body_s):
                async for piece in request.stream():
                    body += piece
                    if len(body) > limit:
                        raise HTTPException(413, f"the body should be at most {limit:,} bytes", {"Connection": "close"})
        except ClientDisconnect:
            raise HTTPException(400, "the connection ended within the body") from None
        except TimeoutError:
            said = f"the body took more than {self._limits.body_s:g} seconds to come"
            raise HTTPException(408, said, {"Connection": "close"}) from None
        return bytes(body)

    def _judgement(self, pair: _Pair, judged: Judgement) -> _Pair:
        """A judgement as it is sent."""
        content: _Pair = {"id": pair["id"]} if "id" in pair else {}
        if judged.error:
            self._errors.inc()
            return content | {"error": judged.error}
        self._tiers.labels(judged.tier).inc()
        content |= asdict(judged)
        del content["error"]
        return content

    async def _health(self, _: Request) -> Response:
        identity = self._judge.identity
        return JSONResponse({
            "status": "ok",
            "version": agrl_jax.__version__,
            "checkpoint": identity["checkpoint"],
            "rulebook": self._judge.book.name,
        })

    async def _scrape(self, _: Request) -> Response:
        text = prometheus_client.generate_latest(self._metrics)
        return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    async def _show_rules(self, _: Request) -> Response:
        return JSONResponse(self._rules)


def rules(book: RuleBook) -> dict[str, Any]:
    """The rule book as it is shown: tiers, steps with their questions and values, and the table."""
    steps = [
        {"name": step.name, "question": step.question, "values": dict(zip(step.values, step.meanings, strict=True))}
        for step in book.steps
    ]
    table = [
        {
            "when": {
                step.name: [step.values[value] for value in values]
                for step, values in zip(book.steps, row.when, strict=True)
                if values
            },
            "tier": book.tiers[row.tier].name,
            "because": row.because,
        }
        for row in book.rows
    ]
    tiers = [asdict(tier) for tier in book.tiers]
    shown = {"name": book.name, "order": book.order, "digest": book.digest}
    return shown | {"tiers": tiers, "steps": steps, "table": table}


# What comes in


def parse(body: bytes) -> Any:
    """The JSON of a body. Raises HTTPException: it is not JSON, or has a field twice."""
    try:
        return json.loads(body, object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the body should be JSON, a pair or a list of pairs: {error}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"a pair has {repeated!r} twice")
    return dict(pairs)


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def check(pair: Any, where: str) -> None:
    """Raises HTTPException where `pair` is not a pair; the message begins with `where`, and names the field."""
    if not isinstance(pair, dict):
        raise HTTPException(400, f"{where}should be an object with a query and a title, not {_kind(pair)}")
    for name, value in pair.items():
        if name not in _FIELDS:
            near = did_you_mean(name, _FIELDS) or f"; there are {', '.join(_FIELDS)}"
            raise HTTPException(400, f"{where}there is no field {name!r}{near}")
        whole = isinstance(value, int) and not isinstance(value, bool)
        number = whole or (isinstance(value, float) and math.isfinite(value))
        if not (value is None or number or isinstance(value, str)):
            raise HTTPException(400, f"{where}{name} should be text or a number, not {_kind(value)}")
        if isinstance(value, str) and not is_unicode(value):
            raise HTTPException(400, f"{where}{name} should be Unicode: half of a character stands alone")
    for name in ("query", "title"):
        if not clean(pair.get(name)):
            raise HTTPException(400, f"{where}{name} should be a text; it is {'empty' if name in pair else 'missing'}")


def _kind(value: Any) -> str:
    kinds = {list: "a list", dict: "an object", str: "text", bool: "a truth value", type(None): "null"}
    number = "an infinite number" if value in (math.inf, -math.inf) else "a number"
    return kinds.get(type(value), number)


def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)
