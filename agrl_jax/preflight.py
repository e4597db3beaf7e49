"""Compiles the RL step of a config for devices that need not be there, and says what it takes.

    python -m agrl_jax.preflight --config=configs/quickstart.py --topology=v5e:4x4

Neither weights nor data are read: shapes are enough. With `--topology` the TPU compiler (`pip install -e .[preflight]`)
compiles for that many chips on any machine; without it, the compiler of the devices at hand does. Prints memory, matrix
operations, traffic and collectives of each phase, what bounds it, and a roofline LOWER bound on the time of a step:
phases one after the other, each as long as the slowest of computing, memory and links at their peak. Prompts and
responses count at their full length. `--workdir` names a run on the devices at hand to measure the bound against.

Exit code 1 where the step does not fit; the command then looks for changes that make it fit, in at most four trials.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING, Any

from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from agrl_jax.runtime.config import ConfigError, exit_with, parse_flags
from agrl_jax.runtime.console import console_table, say
from agrl_jax.runtime.files import OutputError, check_bucket, check_writable, write_json

if TYPE_CHECKING:  # JAX takes seconds to start: functions import what needs it, so that flags are answered at once
    from agrl_jax.bounds.compile import Report

# ------------------------------------------------------------------------------------------------ print


def describe(report: Report, topology: str, guided_share: float) -> None:
    """Prints a report."""
    from agrl_jax.bounds.compile import GIB

    chip, memory = report.chip, report.memory
    mesh = " x ".join(f"{axis} {size}" for axis, size in report.mesh.items())
    say(f"{report.devices} x {chip.name}{f' ({topology})' if topology else ''}, mesh {mesh}")
    sizes = dataclasses.asdict(memory) | {"capacity": chip.memory}
    rows = [(name, f"{size / GIB:.3g}") for name, size in sizes.items()]
    say(console_table("memory of one device", ["", "GiB"], rows))
    say("  cache: of temporaries, while decoding; total: the compiler's, at the peak")
    if not report.phases:
        return
    rows = []
    for name, phase in report.phases.items():
        sent = ", ".join(f"{kind} {size / 1e9:.3g}" for kind, size in sorted(phase.collectives.items()) if size > 1e5)
        tera, giga, milli = (f"{x:.3g}" for x in (phase.flops / 1e12, phase.bytes / 1e9, 1e3 * phase.seconds))
        rows.append((name, tera, giga, sent or "-", milli, phase.bound_by))
    columns = ["phase", "TFLOP", "GB moved", "collectives, GB sent", "ms at least", "bound by"]
    say(console_table(f"one step on one device, guided in {guided_share:.0%} of the steps", columns, rows))
    say(
        f"lower bound: {report.seconds:.4g} s a step, {report.tokens / report.seconds:,.0f} tokens/s over all devices "
        "(prompts and responses of full length; phases do not overlap; within a phase, everything does)"
    )


def measured_seconds(workdir: str) -> float:
    """The median time of a run's RL steps. Raises ConfigError where it has none, or its log is damaged."""
    from agrl_jax.runtime.logs import read_jsonl

    file = epath.Path(workdir) / "metrics.jsonl"
    try:
        rows = read_jsonl(file) if file.exists() else []
    except ValueError as error:
        raise ConfigError(str(error)) from error
    times = [row["time/step_s"] for row in rows if row["stage"] == "rl" and row["step"] > 1]
    if not times:
        raise ConfigError(f"{file}: holds no RL step after the first, which compiles")
    return statistics.median(times)


def versions() -> dict[str, str]:
    """The versions of JAX and, where it is installed, of the TPU compiler."""
    found = {}
    for name in ("jax", "jaxlib", "libtpu"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def run(config: ConfigDict, topology: str, shape: str, guided_share: float, workdir: str) -> dict[str, Any]:
    """Runs the command; returns the figures of the step and, where it does not fit, of the changed one."""
    from agrl_jax.bounds.compile import GIB, compile_step, find_devices, make_it_fit

    check_bucket(workdir)
    measured = measured_seconds(workdir) if workdir else 0.0
    devices, chip = find_devices(topology)
    compile_with = partial(compile_step, devices=devices, chip=chip, shape=shape, guided_share=guided_share)
    report = compile_with(config)
    describe(report, topology, guided_share)
    figures = report.figures() | {"topology": topology, "guided_share": guided_share, "versions": versions()}
    if not report.fits:
        changes, smaller = make_it_fit(config, report, compile_with)
        flags_of = " ".join(f"--config.{name}={value}" for name, value in changes.items())
        total, capacity = smaller.memory.total / GIB, chip.memory / GIB
        say(f"does not fit. With {flags_of}: {total:.1f} of {capacity:.1f} GiB" if changes else "does not fit.")
        say("that fits." if smaller.fits else "neither does that: take more or larger devices, or a smaller policy.")
        figures |= {"changes": changes, "with_changes": smaller.figures()}
    elif workdir:
        say(f"measured: {measured:.4g} s a step, {measured / report.seconds:.1f} times the bound")
        figures |= {"measured": measured}
    return figures


def _define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "A config file, such as configs/quickstart.py.")
    flags.DEFINE_string("topology", "", "TPU chips to compile for, such as v5e:4x4; empty: the devices at hand.")
    flags.DEFINE_string("shape", "", "A config.json with the shape of a pretrained model that is not here.")
    flags.DEFINE_float("guided_share", 1.0, "Share of the steps in which a group fails and is replayed.", 0.0, 1.0)
    flags.DEFINE_string("workdir", "", "A run of this config on the devices at hand, to set against the bound.")
    flags.DEFINE_string("out", "", "A JSON file to write the figures to.")
    flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
    """Exit codes: 0 if the step fits, 1 if not, 2 for bad input."""
    _define_flags()
    parse_flags(argv)
    values = flags.FLAGS
    from agrl_jax.bounds.compile import only_compile
    from agrl_jax.training.run import USER_ERRORS

    if values.topology:
        only_compile()
    try:
        if values.out:
            check_writable(values.out, "--out")
        figures = run(values.config, values.topology, values.shape, values.guided_share, values.workdir)
    except (*USER_ERRORS, OutputError) as error:
        exit_with(error)
    if values.out:
        write_json(values.out, figures)
    raise SystemExit(0 if figures["fits"] else 1)


if __name__ == "__main__":
    main(sys.argv)
