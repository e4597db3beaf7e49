"""Judges Parquet files on a Ray cluster: Ray Data hands batches of rows to judges, each a process of its own.

    pip install 'ray[data]'
    python examples/judge_on_ray.py --checkpoint=my_judge --input=pairs/ --output=judged/ --judges=8 --gpus=1

Input is a Parquet file or a folder of them, output a folder of them with the columns that `agrl_jax.judge` adds; both
may be in a bucket. If a judge dies, or its machine, Ray starts another one, which judges its rows again.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import pyarrow as pa
import ray
import ray.data

from agrl_jax.judging import PREFIX, files
from agrl_jax.judging.engine import Judge


class Judging:
    """A judge that Ray keeps: from batches of rows to batches of judged rows."""

    def __init__(self, checkpoint: str, batch_size: int) -> None:
        self.judge = Judge.from_checkpoint(checkpoint, batch_size=batch_size)
        self.added = files.added_columns(self.judge.book, PREFIX)

    def __call__(self, table: pa.Table) -> pa.Table:
        cells = [files.cells(dataclasses.asdict(one), self.added) for one in self.judge.judge(table)]
        more = pa.Table.from_pylist(cells, self.added)
        return pa.table([*table.columns, *more.columns], schema=pa.schema([*table.schema, *self.added]))


def judge_parquet(
    checkpoint: str, source: str, output: str, judges: int = 1, batch_size: int = 64, judging: type = Judging,
    **resources: Any,
) -> None:
    """Judges the rows of Parquet files into Parquet files in the folder `output`.

    `resources` are those of a judge, such as num_gpus=1. A judge gets four batches at once, which it sorts by length;
    they are also what is judged again if it dies.
    """
    block = 4 * batch_size
    rows = ray.data.read_parquet(source).repartition(target_num_rows_per_block=block).map_batches(
        judging,
        fn_constructor_args=(checkpoint, batch_size),
        batch_size=block,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=judges),
        **resources,
    )
    rows.write_parquet(output)


def main() -> None:
    """Judges what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="what agrl_jax.judge takes, where every machine finds it")
    parser.add_argument("--input", required=True, help="a Parquet file, or a folder of them")
    parser.add_argument("--output", required=True, help="a folder")
    parser.add_argument("--judges", type=int, default=1, help="how many work at once")
    parser.add_argument("--batch_size", type=int, default=64, help="pairs that a judge judges at once")
    parser.add_argument("--cpus", type=float, default=1, help="of each judge; one of the cluster is for reading")
    parser.add_argument("--gpus", type=float, default=0, help="of each judge")
    given = parser.parse_args()
    ray.init()
    cpus = ray.cluster_resources().get("CPU", 0)
    if given.judges * given.cpus > cpus - 1:
        parser.error(f"--judges={given.judges} with --cpus={given.cpus} leave none of the {cpus:g} CPUs for reading")
    judge_parquet(
        given.checkpoint, given.input, given.output, given.judges, given.batch_size, num_cpus=given.cpus,
        num_gpus=given.gpus,
    )  # fmt: skip
    judged = ray.data.read_parquet(given.output)
    print(judged.groupby(f"{PREFIX}tier").count().to_pandas())


if __name__ == "__main__":
    main()
