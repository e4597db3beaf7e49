"""The example that judges on a Ray cluster: all rows are judged once, even if a judge dies during its work."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import quick
from workdirs import make_workdir

from agrl_jax.judging.engine import Judge

ROOT = Path(__file__).parent.parent
ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'ray[data]'")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Path]:
    """A local cluster; yields the file that the first judge to die leaves."""
    died = tmp_path / "died"
    variables = quick.ENVIRONMENT | {"PYTHONPATH": f"{ROOT}:{ROOT}/examples", "DIED": str(died)}
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        variables[name] = os.environ[name]
    ray.init(
        num_cpus=3, include_dashboard=False, object_store_memory=100 << 20, runtime_env={"env_vars": variables},
        log_to_driver=False,
    )  # fmt: skip
    yield died
    ray.shutdown()


@pytest.mark.slow
def test_two_judges_of_which_one_dies_judge_every_row_once(
    cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("judge_on_ray", ROOT / "examples" / "judge_on_ray.py")
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "judge_on_ray", example)  # workers import it by this name
    spec.loader.exec_module(example)

    class Mortal(example.Judging):
        """The first of such judges that is asked for a second batch is killed. No other is."""

        def __call__(self, table: pa.Table) -> pa.Table:
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls == 2:
                try:
                    os.close(os.open(os.environ["DIED"], os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    pass
                else:
                    os.kill(os.getpid(), 9)
            return super().__call__(table)

    (tmp_path / "run").mkdir()
    workdir = make_workdir(tmp_path / "run")
    rows = [{"query": f"shoes {i}", "title": "red " * (i % 5) + "Nike"} for i in range(48)]
    (tmp_path / "pairs").mkdir()
    for part in range(6):
        pq.write_table(pa.Table.from_pylist(rows[8 * part : 8 * part + 8]), tmp_path / "pairs" / f"{part}.parquet")
    example.judge_parquet(
        str(workdir), str(tmp_path / "pairs"), str(tmp_path / "judged"), judges=2, batch_size=2, judging=Mortal,
        num_cpus=1,
    )  # fmt: skip
    judged = pq.read_table(tmp_path / "judged").to_pylist()
    found = {row["query"]: row for row in judged}
    assert cluster.exists() and len(judged) == len(found) == 48
    expected = Judge.from_checkpoint(str(workdir), batch_size=8).judge(rows)
    for row, one in zip(rows, expected, strict=True):
        assert found[row["query"]]["title"] == row["title"]
        assert (found[row["query"]]["judge_tier"], found[row["query"]]["judge_response"]) == (one.tier, one.response)
        assert dataclasses.asdict(one)["error"] == found[row["query"]]["judge_error"] == ""
