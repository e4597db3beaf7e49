"""The judge over HTTP: its answers, refusals and batches, and that it stops without losing a request."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import commands
import pytest
import quick
from workdirs import make_workdir

pytest.importorskip("starlette", reason="pip install 'agrl_jax[serve]' httpx2")
from starlette.testclient import TestClient  # noqa: E402

from agrl_jax import serve  # noqa: E402
from agrl_jax.judging.engine import Judge, Judgement  # noqa: E402
from agrl_jax.judging.serving import Batcher, Limits, Service  # noqa: E402
from agrl_jax.judging.trained import Settings  # noqa: E402
from agrl_jax.rulebook.book import load  # noqa: E402
from agrl_jax.runtime.config import ConfigError  # noqa: E402

ROOT = Path(__file__).parent.parent
PAIR = {"query": "red shoes", "title": "Nike running shoes, red"}


class Echo:
    """A judge that answers with the title, at once or when it may. It remembers which titles came together."""

    chunk, book, identity = 8, load(), {"checkpoint": "echo"}

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.free = threading.Event()
        self.free.set()

    def judge(self, pairs: list[dict]) -> list[Judgement]:
        self.asked.append([pair["title"] for pair in pairs])
        assert self.free.wait(60)
        if any(pair["title"] == "broken" for pair in pairs):
            raise RuntimeError("out of memory")
        return [
            Judgement(error="too long") if pair["title"] == "long" else Judgement("2-Mismatch", response=pair["title"])
            for pair in pairs
        ]


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
def client(echo: Echo) -> Iterator[TestClient]:
    limits = Limits(rows=3, bytes=1000, waiting=5)
    with TestClient(Service(echo, limits).application()) as opened:
        yield opened


# What it answers


@pytest.mark.slow
def test_it_answers_what_the_judge_says(tmp_path: Path) -> None:
    judge = Judge.from_checkpoint(str(make_workdir(tmp_path)), batch_size=2, settings=Settings(prompt_len=32))
    pairs = [PAIR, {"query": "boots", "title": "Boots", "price": 59.5, "id": 7, "brand": None}]
    expected = [dataclasses.asdict(one) for one in judge.judge(pairs)]
    for one in expected:
        assert one.pop("error") == ""
    with TestClient(Service(judge).application()) as client:
        assert client.post("/judge", json=pairs).json() == [expected[0], {"id": 7} | expected[1]]
        alone = client.post("/judge", json=PAIR)
        assert alone.status_code == 200
        assert {k: v for k, v in alone.json().items() if k != "probs"} == {
            k: v for k, v in expected[0].items() if k != "probs"
        }
        assert alone.json()["probs"] == pytest.approx(expected[0]["probs"], abs=1e-5)
        health = client.get("/health").json()
        assert health["status"] == "ok" and health["checkpoint"] == judge.identity["checkpoint"]
        too_long = client.post("/judge", json={"query": "shoes " * 100, "title": "Nike"})
        assert too_long.status_code == 422 and "prompt_len is 32" in too_long.json()["error"]


@pytest.mark.slow
def test_a_warm_judge_compiles_nothing_more(tmp_path: Path) -> None:
    judge = Judge.from_checkpoint(str(make_workdir(tmp_path)), batch_size=2, settings=Settings(prompt_len=40))
    judge.warm_up()
    compiled = judge._answer._cache_size()
    judge.judge([PAIR, {"query": "a", "title": "b"}, {"query": "red " * 6, "title": "Nike " * 40}])
    assert judge._answer._cache_size() == compiled == 3  # of 16, 32 and 48 tokens


def test_the_rule_book_is_shown(client: TestClient) -> None:
    shown = client.get("/rules").json()
    assert shown["digest"] == load().digest
    assert [tier["name"] for tier in shown["tiers"]] == ["4-Excellent", "3-Related", "2-Mismatch", "1-Irrelevant"]
    assert list(shown["steps"][0]["values"]) == ["same", "substitute", "complement", "different"]
    assert shown["table"][0]["when"] == {"category": ["different"]} and shown["table"][-1]["when"] == {}


def test_a_pair_of_a_list_that_cannot_be_judged_leaves_the_others(client: TestClient) -> None:
    judged = client.post("/judge", json=[PAIR, {"id": "x", "query": "a", "title": "long"}])
    assert judged.status_code == 200
    assert judged.json()[0]["response"] == PAIR["title"] and judged.json()[1] == {"id": "x", "error": "too long"}


# What it refuses


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"", 400, "the body should be JSON, a pair or a list of pairs: Expecting value"),
        (b"query=a", 400, "the body should be JSON"),
        (b"\xff", 400, "the body should be JSON"),
        (b"[" * 900, 400, "the body should be JSON"),
        (b'{"query": "a", "query": "b", "title": "c"}', 400, "a pair has 'query' twice"),
        (b'{"query": "a", "title": "c", "price": NaN}', 400, "NaN is no number in JSON"),
        (b'{"query": "a", "title": "c", "price": 1e999}', 400, "price should be text or a number, not an infinite"),
        (b"7", 400, "should be an object with a query and a title, not a number"),
        (b"[]", 400, "a list should hold 1 to 3 pairs, not 0"),
        (json.dumps([PAIR] * 4).encode(), 413, "a list should hold 1 to 3 pairs, not 4"),
        (b'"' + b"a" * 1000 + b'"', 413, "the body should be at most 1,000 bytes"),
        (json.dumps([PAIR, [PAIR]]).encode(), 400, "pair 1: should be an object with a query and a title, not a list"),
        (json.dumps(PAIR | {"titel": "x"}).encode(), 400, "there is no field 'titel'; did you mean 'title'?"),
        (json.dumps(PAIR | {"brand": ["x"]}).encode(), 400, "brand should be text or a number, not a list"),
        (json.dumps([PAIR, PAIR | {"color": True}]).encode(), 400, "pair 1: color should be text or a number, not a "),
        (b'{"query": "a", "title": "b", "id": "\\ud800"}', 400, "id should be Unicode: half of a character"),
        (b'{"query": "a"}', 400, "title should be a text; it is missing"),
        (b'[{"query": " ", "title": "b"}]', 400, "pair 0: query should be a text; it is empty"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_line(client: TestClient, echo: Echo, body: bytes, status: int, said: str) -> None:
    refused = client.post("/judge", content=body)
    assert refused.status_code == status
    assert list(refused.json()) == ["error"]
    assert said in refused.json()["error"] and "\n" not in refused.json()["error"]
    assert not echo.asked


def test_a_whole_number_may_be_of_any_size(client: TestClient) -> None:
    body = b'{"query": "a", "title": "c", "price": 1' + b"0" * 400 + b"}"
    assert client.post("/judge", content=body).status_code == 200


def test_other_paths_and_methods(client: TestClient) -> None:
    assert client.get("/judge").status_code == 405
    nowhere = client.get("/nowhere")
    assert nowhere.status_code == 404 and list(nowhere.json()) == ["error"]


def test_a_judge_that_fails_is_an_error_of_the_server(client: TestClient) -> None:
    failed = client.post("/judge", json=PAIR | {"title": "broken"})
    assert (failed.status_code, failed.json()) == (500, {"error": "the judge failed; its log says why"})
    assert client.post("/judge", json=PAIR).status_code == 200  # the server goes on


def test_what_waits_is_limited(client: TestClient, echo: Echo) -> None:
    echo.free.clear()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(client.post, "/judge", json=[PAIR] * 3)
        while not echo.asked:
            pass
        refused = client.post("/judge", json=[PAIR] * 3)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert "3 pairs are waiting already" in refused.json()["error"]
        second = pool.submit(client.post, "/judge", json=[PAIR] * 2)
        echo.free.set()
        assert first.result().status_code == second.result().status_code == 200


# How it batches


def test_what_comes_while_the_judge_is_busy_is_judged_together(echo: Echo) -> None:
    async def ask() -> list[list[Judgement]]:
        batcher = Batcher(echo, window_s=0)
        running = asyncio.create_task(batcher.run())
        echo.free.clear()
        first = asyncio.create_task(batcher.judge([{"title": "0"}]))
        while not echo.asked:
            await asyncio.sleep(0)
        # A chunk of 8 ends with the request that fills it: 2 + 5 + 3, then the rest.
        requests = [[{"title": f"{i}.{k}"} for k in range(size)] for i, size in enumerate((2, 5, 3, 1, 1))]
        later = [asyncio.create_task(batcher.judge(pairs)) for pairs in requests]
        await asyncio.sleep(0)
        assert batcher.waiting == 13
        echo.free.set()
        answers = await asyncio.gather(first, *later)
        assert batcher.waiting == 0
        running.cancel()
        return answers

    answers = asyncio.run(ask())
    assert [len(asked) for asked in echo.asked] == [1, 10, 2]
    assert [[one.response for one in answer] for answer in answers] == [
        ["0"], ["0.0", "0.1"], ["1.0", "1.1", "1.2", "1.3", "1.4"], ["2.0", "2.1", "2.2"], ["3.0"], ["4.0"]
    ]  # fmt: skip


def test_the_window_brings_requests_together(echo: Echo) -> None:
    async def ask() -> None:
        batcher = Batcher(echo, window_s=30)
        running = asyncio.create_task(batcher.run())

        async def request(number: int) -> None:
            for _ in range(50 * number):  # the batcher could begin with those before it
                await asyncio.sleep(0)
            await batcher.judge([{"title": str(number)}])

        await asyncio.gather(*map(request, range(8)))
        running.cancel()

    asyncio.run(asyncio.wait_for(ask(), 20))  # a full chunk does not wait for the end of the window
    assert echo.asked == [[str(i) for i in range(8)]]


def test_metrics_count_what_came(client: TestClient) -> None:
    client.post("/judge", json=[PAIR, PAIR | {"title": "long"}])
    client.post("/judge", json={"query": "a"})
    text = client.get("/metrics").text
    for line in (
        'agrl_jax_requests_total{status="200"} 1.0',
        'agrl_jax_requests_total{status="400"} 1.0',
        'agrl_jax_pairs_total{tier="2-Mismatch"} 1.0',
        "agrl_jax_pair_errors_total 1.0",
        "agrl_jax_request_seconds_count 2.0",
        "agrl_jax_pairs_waiting 0.0",
        "agrl_jax_judge_calls 1.0",
    ):
        assert f"\n{line}\n" in text


# The command


def start(workdir: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "agrl_jax.serve", f"--checkpoint={workdir}", *arguments],
        cwd=ROOT, env=os.environ | quick.ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_port_that_is_taken_is_refused_before_the_model_is_read(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        port = bound.getsockname()[1]
        assert commands.exit_code(serve.main, f"--checkpoint={tmp_path}", f"--port={port}") == 2
    said = f"error: --host=127.0.0.1 --port={port}: Address already in use; name another\n"
    assert capfd.readouterr().err == said


def test_a_request_that_could_never_be_taken_is_no_setting() -> None:
    with pytest.raises(ConfigError, match="--max_pairs=9 should be at most --max_waiting=8"):
        serve.run(SimpleNamespace(max_pairs=9, max_waiting=8))


def test_without_the_extra_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert commands.exit_code(serve.main, "--checkpoint=x") == 2
    assert capfd.readouterr().err == "error: serving needs uvicorn: pip install 'agrl_jax[serve]'\n"


@pytest.mark.slow
def test_200_requests_at_once_and_sigterm_amid_them(tmp_path: Path) -> None:
    """Every request that the server accepts, even while it stops, is answered with its own judgement. Other requests
    find no server."""
    workdir = make_workdir(tmp_path)
    # The window is longer than the requests take to arrive, so they are waiting when SIGTERM comes.
    server = start(workdir, "--port=0", "--batch_size=64", "--window_ms=3000", "--prompt_len=64")
    try:
        url = re.search(r"http://\S+", server.stdout.readline()).group()

        def ask(number: int) -> dict | str:
            body = json.dumps({"id": number, "query": f"shoes {number}", "title": "red " * (number % 5) + "Nike"})
            request = urllib.request.Request(f"{url}/judge", body.encode(), {"Content-Type": "application/json"})
            try:
                with urllib.request.urlopen(request, timeout=120) as answer:
                    return json.load(answer)
            except (urllib.error.URLError, ConnectionError) as error:
                return str(error)

        def metric(name: str) -> float:
            with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
                return float(re.search(rf"^agrl_jax_{name} (\S+)$", answer.read().decode(), re.MULTILINE).group(1))

        with concurrent.futures.ThreadPoolExecutor(200) as pool:
            asked = [pool.submit(ask, number) for number in range(200)]
            while metric("requests_in_flight") < 100:
                pass
            assert not any(one.done() for one in asked)
            server.send_signal(signal.SIGTERM)
            answers = [one.result() for one in asked]
        said, errors = server.communicate(timeout=120)
    finally:
        server.kill()
    accepted, answered = map(int, re.search(r"stopped: (\d+) requests accepted, (\d+) answered", said).groups())
    judged = [(number, one) for number, one in enumerate(answers) if isinstance(one, dict)]
    assert 100 <= accepted == answered == len(judged) and server.returncode == 0, errors
    judge = Judge.from_checkpoint(str(workdir), batch_size=64, settings=Settings(prompt_len=64))
    rows = [{"query": f"shoes {number}", "title": "red " * (number % 5) + "Nike"} for number, _ in judged]
    for (number, one), expected in zip(judged, judge.judge(rows), strict=True):
        assert (one["id"], one["tier"], one["response"]) == (number, expected.tier, expected.response)
