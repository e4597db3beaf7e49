"""What the tests of sampling and training share: a rule book of two steps, a vocabulary in which each part of a
response is one token, a policy small enough to compile in a second, batches whose truth is known, and a browser."""

from __future__ import annotations

import gc
import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from agrl_jax.data.bundled import benchmark, catalog
from agrl_jax.policy import transformer
from agrl_jax.policy.layers import PolicyConfig
from agrl_jax.policy.transformer import build
from agrl_jax.rulebook import wording
from agrl_jax.rulebook.automaton import compile_tables
from agrl_jax.rulebook.book import RuleBook, load
from agrl_jax.types import Batch, Params, Policy, RuleTables

# Compiled programs are kept, for all tests, for the processes that they start, and for the next time.
_CACHE = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{Path(__file__).parent.parent}/.pytest_cache/compiled")
_SECONDS = os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
jax.config.update("jax_compilation_cache_dir", _CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", float(_SECONDS))
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick.COMPILING['XLA_FLAGS']}".strip()  # read late
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_default_matmul_precision", "highest")  # by default, a GPU keeps 10 bits of float32

# Steps fit (yes 0, part 1, no 2) and brand (ok 0, off 1); tiers good 0, fair 1, bad 2.
BOOK = """\
name: tiny
response: {phrase: "{part}:{value}", separator: ",", tier: T}
tiers:
  - {name: good, grade: 3, good: true}
  - {name: fair, grade: 2, good: true}
  - {name: bad, grade: 1, good: false}
steps:
  - {name: fit, label: F, question: does it fit, values: [yes, part, no]}
  - {name: brand, label: B, question: is it of that brand, values: [ok, off]}
table:
  - {when: {fit: no}, tier: bad}
  - {when: {brand: off}, tier: fair}
  - {when: {fit: part}, tier: fair}
  - {when: otherwise, tier: good}
"""
WORDS = ("F:yes", "F:part", "F:no", ",B:ok", ",B:off", ",T:good", ",T:fair", ",T:bad", "x", "y")
VOCABULARY = (*(word.encode() for word in WORDS), None, None)  # tokens 0 to 9, a special token, the end
END = len(VOCABULARY) - 1
PROMPT_LEN, RESPONSE_LEN = 5, 6  # S, T


class Small(NamedTuple):
    """One rule book, vocabulary and policy. A whole response is 4 tokens: fit, brand, tier, end."""

    book: RuleBook
    tables: RuleTables
    config: PolicyConfig
    policy: Policy
    params: Params  # larger than untrained ones, whose logits are almost equal

    def batch(
        self, steps: Sequence[Sequence[int]], tiers: Sequence[int] | None = None, rows: Sequence[int] | None = None
    ) -> Batch:
        """Examples with these true step values. Tiers are those of the table unless given; a row decides its prompt."""
        rows = range(len(steps)) if rows is None else rows
        tiers = [self.book.tier_for(values) for values in steps] if tiers is None else tiers
        prompts = [_prompt(row) for row in rows]
        golds = [wording.gold_segments(self.book, *truth) for truth in zip(tiers, steps, strict=True)]
        parts = len(self.book.parts)
        ids = [[WORDS.index(text) for text in gold] + [END] * (len(gold) == parts) for gold in golds]
        return Batch(
            prompt=_padded(prompts, PROMPT_LEN),
            prompt_len=_int32(map(len, prompts)),
            gold=_padded(ids, RESPONSE_LEN),
            gold_len=_int32(map(len, ids)),
            part_end=_int32([min(shown, len(gold)) for shown in range(1, parts + 1)] for gold in golds),
            known_parts=_int32(map(len, golds)),
            steps=_int32(steps),
            tier=_int32(tiers),
            row=_int32(rows),
            family=_int32(row % 2 for row in rows),
        )


    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """[n, V] of what follows each of n tokens, at most 16. All lengths are padded to one, so it compiles once."""
        padded = _int32([*tokens, *itertools.repeat(0, 16 - len(tokens))])
        return np.asarray(_logits(self.policy, self.params, padded))[: len(tokens)]


@partial(jax.jit, static_argnums=0)
def _logits(policy: Policy, params: Params, tokens: jax.Array) -> jax.Array:
    hidden, _ = policy.apply(params, tokens[None, None])
    return policy.unembed(params, hidden[0, 0])


def _prompt(row: int) -> list[int]:
    rng = np.random.default_rng(row)
    return rng.integers(0, END, rng.integers(2, PROMPT_LEN + 1)).tolist()


def _padded(rows: Sequence[Sequence[int]], length: int) -> np.ndarray:
    return _int32([*row, *itertools.repeat(0, length - len(row))] for row in rows)


def _int32(values) -> np.ndarray:
    return np.array(list(values), np.int32)


def make_small(folder: Path, **shape: int) -> Small:
    """Writes the rule book to `folder`, and draws the policy; `shape` are fields of its config."""
    path = folder / "tiny.yaml"
    path.write_text(BOOK)
    book = load(path)
    fields = {"width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp": 48} | shape
    config = PolicyConfig(vocab_size=len(VOCABULARY), tied=True, **fields)
    policy, init, _ = build(config)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(init, jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype), shapes)
    return Small(book, compile_tables(book, VOCABULARY, END), config, policy, params)


def lenient(tables: RuleTables) -> RuleTables:
    """The tables, changed so that every answer is well-formed: an untrained policy hardly ever samples one that is."""
    return tables.replace(grammar_distance=0 * tables.grammar_distance)


def pytest_collection_finish() -> None:
    """What was imported stays, so collections of garbage need not look at it again and again."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return make_small(tmp_path_factory.mktemp("book"))


@pytest.fixture(scope="session")
def close() -> Callable[..., None]:
    """Asserts that two pytrees agree, each tensor within a relative L2 distance (1e-5 unless given)."""

    def check(actual: Params, expected: Params, tolerance: float = 1e-5) -> None:
        def leaf(path, a, b) -> None:
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            assert a.shape == b.shape
            distance, size = np.linalg.norm(a - b), np.linalg.norm(b)
            assert distance <= tolerance * size, f"{jax.tree_util.keystr(path)}: {distance} against {size}"

        jax.tree_util.tree_map_with_path(leaf, actual, expected)

    return check


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with some pairs of each split of the benchmark: reading all pairs takes longer than a test's run."""
    folder, make = tmp_path_factory.mktemp("data"), catalog.splits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog, "splits", lambda seed: make(seed, dict.fromkeys(catalog.SIZES, 1000)))
        benchmark.builder(folder)
    return folder


def empty_bucket() -> type[MemoryFileSystem]:
    """A file system in memory, in place of Google's buckets."""

    class Bucket(MemoryFileSystem):
        protocol, store, pseudo_dirs = "gcs", {}, [""]

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            path = str(path).removeprefix("gs://").strip("/")
            return f"/{path}" if path else ""

    return Bucket


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a bucket in memory, with which paths begin."""
    Bucket = empty_bucket()
    monkeypatch.setattr(epath.backend.fsspec_backend, "_get_filesystem", lambda name: Bucket())
    return "gs://bucket"


@pytest.fixture
def quick_compiles() -> None:
    """Settings of all tests."""


@pytest.fixture(scope="module")
def scanned() -> Iterator[None]:
    """Scans the layers of policies with three layers too, as in deep ones: they compile in a third of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer, "_UNROLLED", 2)
        yield


@pytest.fixture(scope="session")
def browser() -> Iterator:
    """Headless Chromium, driven by selenium. If either is missing, the test is skipped."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "disable-quic", "no-first-run",
                 "disable-background-networking", "disable-component-update", "disable-sync"):  # fmt: skip
        options.add_argument(f"--{flag}")
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()
