"""Counts from a step's jaxpr and from its compiled text, compared with counts by hand; compiling for TPUs."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
import tiny

from agrl_jax import preflight
from agrl_jax.bounds import compile, hlo
from agrl_jax.bounds.compile import CHIPS, Chip, Memory, Report
from agrl_jax.bounds.flops import matrix_flops
from agrl_jax.policy import loading, transformer
from agrl_jax.runtime.config import ConfigError
from agrl_jax.training import run

ROOT = Path(__file__).parent.parent
CHIP = Chip("test", 1e12, 2**30, 1e11, 1e10)

# A loop of 5 turns that takes one of the weights [5, 8, 16] in each, then an all-reduce over 4 devices; and a branch.
PROGRAM = """\
HloModule jit_step, is_scheduled=true

%fused (p0: f32[5,8,16], p1: s32[], p2: f32[2,8]) -> f32[2,16] {
  %p0 = f32[5,8,16]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %c0 = s32[] constant(0)
  %ds = f32[1,8,16]{2,1,0} dynamic-slice(%p0, %p1, %c0, %c0), dynamic_slice_sizes={1,8,16}
  %w = f32[8,16]{1,0} bitcast(%ds)
  %p2 = f32[2,8]{1,0} parameter(2)
  ROOT %dot = f32[2,16]{1,0} dot(%p2, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (state: (s32[], f32[5,8,16], f32[2,8])) -> (s32[], f32[5,8,16], f32[2,8]) {
  %state = (s32[], f32[5,8,16]{2,1,0}, f32[2,8]{1,0:T(2,128)S(1)}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %weights = f32[5,8,16]{2,1,0} get-tuple-element(%state), index=1
  %x = f32[2,8]{1,0:T(2,128)S(1)} get-tuple-element(%state), index=2
  %y = f32[2,16]{1,0} fusion(%weights, %i, %x), kind=kOutput, calls=%fused, metadata={op_name="jit(step)/decode/dot"}
  %all = f32[2,16]{1,0} all-reduce(%y), channel_id=1, replica_groups=mesh['a'=4,'b'=2] {'a'}, to_apply=%add
  ROOT %next = (s32[], f32[5,8,16]{2,1,0}, f32[2,8]{1,0:T(2,128)S(1)}) tuple(%i, %weights, %x)
}

%condition (state.1: (s32[], f32[5,8,16], f32[2,8])) -> pred[] {
  %state.1 = (s32[], f32[5,8,16]{2,1,0}, f32[2,8]{1,0:T(2,128)S(1)}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %five = s32[] constant(5)
  ROOT %lt = pred[] compare(%i.1, %five), direction=LT
}

%taken (t: f32[4]) -> f32[4] {
  %t = f32[4]{0} parameter(0)
  ROOT %copied = f32[4]{0} copy(%t)
}

%not_taken (n: f32[4]) -> f32[4] {
  ROOT %n = f32[4]{0} parameter(0)
}

ENTRY %main (p: f32[5,8,16], flag: pred[], q: f32[4]) -> f32[4] {
  %p = f32[5,8,16]{2,1,0} parameter(0)
  %start = (s32[], f32[5,8,16]{2,1,0}, f32[2,8]{1,0:T(2,128)S(1)}) tuple(%p, %p, %p)
  %loop = (s32[], f32[5,8,16]{2,1,0}, f32[2,8]{1,0:T(2,128)S(1)}) while(%start), condition=%condition, body=%body, metadata={op_name="jit(step)/decode/while"}
  %flag = pred[] parameter(1)
  %q = f32[4]{0} parameter(2)
  ROOT %out = f32[4]{0} conditional(%flag, %q, %q), branch_computations={%not_taken, %taken}, metadata={op_name="jit(step)/replay/cond"}
}
"""  # noqa: E501 (the compiler's own lines)


def test_traffic_of_a_program_worked_out_by_hand():
    found = hlo.traffic(PROGRAM, ("decode", "replay"), branch_share=0.25)
    fusion = 8 * 16 * 4 + 4 + 2 * 16 * 4  # weights of a layer, counter, result; x is on the chip
    all_reduce = 2 * (2 * 16 * 4)  # read and written
    compare = 5 * (1 + 4 + 4)  # the condition reads counter and constant, writes its result
    assert found["decode"].bytes == 5 * (fusion + all_reduce) + compare
    assert found["decode"].collectives == {"all-reduce": 5 * (2 * 16 * 4) * 2 * 3 / 4}  # 2 (n - 1) / n, n = 4
    assert found["replay"].bytes == 0.25 * 2 * 4 * 4
    assert sum(traffic.bytes for traffic in found.values()) == found["decode"].bytes + found["replay"].bytes


def test_a_loop_without_a_count_is_refused():
    with pytest.raises(ValueError, match=r"the loop loop \(jit\(step\)/decode/while\) compares .* to no const"):
        hlo.traffic(PROGRAM.replace("%five = s32[] constant(5)", "%five = s32[] copy(%i.1)"), ("decode",))


# An all-gather of [1, 8] over 8 devices on a TPU. It begins in one fusion and goes on in another, in a loop of 3 turns.
SPREAD = """\
%begin (b: f32[1,8]) -> f32[8,8] {
  %b = f32[1,8]{1,0} parameter(0)
  ROOT %g1 = f32[8,8]{1,0} all-gather(%b), channel_id=1, replica_groups=[1,8]<=[8], backend_config={"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"}}
}

%beside (c: f32[1,8], d: f32[8,8], e: f32[4]) -> (f32[4], f32[8,8]) {
  %c = f32[1,8]{1,0} parameter(0)
  %d = f32[8,8]{1,0} parameter(1)
  %e = f32[4]{0} parameter(2)
  %twice = f32[4]{0} add(%e, %e)
  %g2 = f32[8,8]{1,0} all-gather(%c), channel_id=1, replica_groups=[1,8]<=[8], backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
  ROOT %both = (f32[4]{0}, f32[8,8]{1,0}) tuple(%twice, %g2)
}

%body (s: (s32[], f32[1,8], f32[8,8], f32[4])) -> (s32[], f32[1,8], f32[8,8], f32[4]) {
  %s = (s32[], f32[1,8]{1,0}, f32[8,8]{1,0}, f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[1,8]{1,0} get-tuple-element(%s), index=1
  %y = f32[8,8]{1,0} get-tuple-element(%s), index=2
  %z = f32[4]{0} get-tuple-element(%s), index=3
  %go = (f32[4]{0}, f32[8,8]{1,0}) fusion(%x, %y, %z), kind=kLoop, calls=%beside
  ROOT %t = (s32[], f32[1,8]{1,0}, f32[8,8]{1,0}, f32[4]{0}) tuple(%i, %x, %y, %z)
}

%condition (r: (s32[], f32[1,8], f32[8,8], f32[4])) -> pred[] {
  ROOT %r = (s32[], f32[1,8]{1,0}, f32[8,8]{1,0}, f32[4]{0}) parameter(0)
}

ENTRY %main (p: f32[1,8], q: f32[4]) -> f32[8,8] {
  %p = f32[1,8]{1,0} parameter(0)
  %q = f32[4]{0} parameter(1)
  %start = f32[8,8]{1,0} fusion(%p), kind=kCustom, calls=%begin
  %zero = s32[] constant(0)
  %init = (s32[], f32[1,8]{1,0}, f32[8,8]{1,0}, f32[4]{0}) tuple(%zero, %p, %start, %q)
  ROOT %loop = (s32[], f32[1,8]{1,0}, f32[8,8]{1,0}, f32[4]{0}) while(%init), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
}
"""  # noqa: E501


def test_a_collective_spread_over_a_loop_counts_once():
    found = hlo.traffic(SPREAD, ())["other"]
    assert found.collectives == {"all-gather": 8 * 8 * 4 * 7 / 8}
    assert found.bytes == (1 + 8) * 8 * 4 + 3 * (4 + 4) * 4  # gathered pieces once, other work in each turn


@pytest.mark.parametrize(
    ("groups", "size"),
    [("{{0,1,2},{3,4,5}}", 3), ("[2,8]<=[16]", 8), ("mesh['a'=4,'b'=2] {'a','b'}", 8), ("mesh['a'=4] {'a'}", 4)],
)
def test_how_many_devices_take_part_in_a_collective(groups, size):
    line = f"  %r = f32[8]{{0}} all-gather(%x), channel_id=1, replica_groups={groups}, dimensions={{0}}"
    text = f"ENTRY %main (x: f32[1]) -> f32[8] {{\n  %x = f32[1]{{0}} parameter(0)\n{line}\n}}\n"
    assert hlo.traffic(text, ())["other"].collectives == {"all-gather": 32 * (1 - 1 / size)}


def test_matrix_operations_of_loops_branches_and_gradients():
    def function(x, w):
        with jax.named_scope("scan"):
            x = jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=3)[0]
        with jax.named_scope("while"):
            x = jax.lax.while_loop(lambda s: (s[0] < 7) & (s[1][0, 0] < 1), lambda s: (s[0] + 1, s[1] @ w), (0, x))[1]
        with jax.named_scope("branch"):
            x = jax.lax.cond(x[0, 0] > 0, lambda x: x @ w, lambda x: x, x)
        with jax.named_scope("platform"):  # only one of the two is compiled, and it always runs
            x = jax.lax.platform_dependent(x, cuda=lambda x: x @ w @ w, default=lambda x: x @ w)
        with jax.named_scope("gradient"):
            return jax.grad(lambda w: jnp.sum(jax.checkpoint(lambda w: jnp.tanh(x @ w))(w)))(w)

    jaxpr = jax.make_jaxpr(function)(jnp.ones((2, 4)), jnp.ones((4, 4))).jaxpr
    one = 2 * 2 * 4 * 4
    phases = ("scan", "while", "branch", "platform", "gradient")
    found = matrix_flops(jaxpr, phases, branch_share=0.5)
    assert found == {
        "scan": 3 * one, "while": 7 * one, "branch": one / 2, "platform": one, "gradient": 3 * one  # forward twice
    }  # fmt: skip


def test_matrix_operations_of_ragged_products():
    def function(x, w, sizes):
        return jax.grad(lambda w: jnp.sum(jax.lax.ragged_dot(x, w, sizes)))(w)

    args = jnp.ones((6, 4)), jnp.ones((3, 4, 5)), jnp.array([1, 2, 3])
    forward = matrix_flops(jax.make_jaxpr(jax.lax.ragged_dot)(*args).jaxpr, ())
    assert forward == {"other": 2 * 6 * 4 * 5}
    assert matrix_flops(jax.make_jaxpr(function)(*args).jaxpr, ()) == {"other": 2 * 2 * 6 * 4 * 5}


@pytest.fixture
def uncompiled(monkeypatch):
    """Steps are traced and counted, but not lowered and compiled, which takes longer."""
    monkeypatch.setattr("agrl_jax.bounds.compile.traffic", lambda *_: {})
    monkeypatch.setattr(jax.stages.Traced, "lower", lambda self: _Program())


def step_flops(monkeypatch, **fields):
    """Matrix operations by phase, of a step of the tiny config with some fields changed."""
    monkeypatch.setattr(transformer, "_UNROLLED", 0)
    report = compile.compile_step(config(**fields), jax.devices()[:1], CHIP)
    return {name: phase.flops for name, phase in report.phases.items()}


class _Program:
    """Stands in for lowered and compiled programs in tests that count only the jaxpr."""

    def compile(self):
        return self

    def memory_analysis(self):
        sizes = ("peak_memory", "argument_size", "output_size", "alias_size", "temp_size")
        return type("Sizes", (), {f"{name}_in_bytes": 0 for name in sizes})

    def as_text(self):
        return ""


def config(**fields):
    c = tiny.get_config()
    c.reward.overlong_from = 12
    c.update_from_flattened_dict({"data.response_len": 16} | fields)
    return c


@pytest.mark.parametrize(("layers", "length", "micro", "chunk"), [(8, 16, 1, 0), (2, 64, 4, 8)])
def test_matrix_operations_of_the_step_worked_out_by_hand(uncompiled, monkeypatch, layers, length, micro, chunk):
    found = step_flops(monkeypatch, **{
        "policy.layers": layers, "data.response_len": length, "rl.micro_batches": micro,
        "objective.logprob_chunk": chunk,
    })  # fmt: skip
    b, g, s, t, v = 8, 4, 96, length, 600
    d, hf, kf, m = 32, 32, 16, 64  # width, heads, key/value heads, feed-forward
    linear = 2 * (d * hf + 2 * d * kf + hf * d + 3 * d * m)  # of a token in a layer
    head = 2 * d * v

    def attending(keys):  # scores and mixture, over all slots, used or not
        return 2 * 2 * hf * keys

    prefill = b * s * layers * (linear + attending(s))
    assert found["prefill"] == prefill
    assert found["decode"] == b * g * ((t - 1) * layers * (linear + attending(s + t)) + t * head)
    answers = b * g * (t - 1)
    forward = prefill + answers * layers * (linear + attending(s + t - 1))
    again = b * s * layers * attending(s) + answers * layers * attending(s + t - 1)
    # The backward pass computes attention of scanned layers and logits in chunks again.
    assert found["loss"] == 3 * forward + again + (4 if chunk else 3) * b * g * t * head
    slots, replace = b // 2, 2
    parallel = slots * t * layers * (linear + attending(s + t))  # the forced prefix, once for each group
    again = (t - 1) * layers * (linear + attending(s + t + t)) + t * head  # with room for the whole prefix
    assert found["replay"] == parallel + slots * replace * again


def test_guided_share_weighs_the_replay_alone(uncompiled):
    whole, half = (
        compile.compile_step(config(), jax.devices()[:1], CHIP, guided_share=share).phases for share in (1.0, 0.5)
    )
    assert half["replay"].flops == whole["replay"].flops / 2
    assert half["decode"] == whole["decode"] and half["loss"] == whole["loss"]


def test_refill_samples_again_and_stages_without_rl_are_refused(uncompiled, monkeypatch):
    plain = {"guidance.enabled": False, "reward.composition": "terminal"}
    once = step_flops(monkeypatch, method="grpo", **plain)
    thrice = step_flops(monkeypatch, method="grpo_ds", **plain, **{"rl.candidates": 3})
    assert {name: thrice[name] / once[name] for name in once} == {"prefill": 3, "decode": 3, "loss": 1, "update": 1}
    for fields in ({"method": "dpo"}, {"method": "sft", "rl.steps": 0}):
        with pytest.raises(ValueError, match=f"method={fields['method']} makes no step of RL"):
            compile.compile_step(config(**fields), jax.devices()[:1], CHIP)


@pytest.mark.slow
def test_traffic_of_the_step_scales_with_layers_and_length(monkeypatch):
    monkeypatch.setattr(transformer, "_UNROLLED", 0)

    def phases(**fields):
        return compile.compile_step(config(**fields), jax.devices()[:1], CHIP).phases

    def moved(phase, *of):
        return [each[phase].bytes for each in of]

    base, three, four = (phases(**{"policy.layers": layers}) for layers in (2, 3, 4))
    for phase in ("prefill", "decode", "loss"):
        low, middle, high = moved(phase, base, three, four)
        assert high - middle == pytest.approx(middle - low, rel=0.02), phase
    weights = 4 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)  # bytes of a layer
    low, high = moved("decode", base, four)
    assert high - low > 16 * 2 * weights  # each token reads all of them
    short, long = moved("decode", base, phases(**{"data.response_len": 64}))
    slot = 2 * 2 * 8 * 4 * 16 * 4  # bytes of a position in the cache: keys and values, layers, answers
    # Each token reads all slots at least once. The compiler may read more, and how much depends on the length.
    assert 48 * slot < long / 64 - short / 16 < 10 * 48 * slot
    quarter = phases(**{"rl.micro_batches": 4})
    low, high = moved("loss", base, quarter)
    assert high > low  # weights are read once for each piece


@pytest.mark.parametrize(
    ("figures", "warnings"),
    [
        ({"policy/truncated": 0.1, "reward/equal_groups": 0.5, "guide/failing": 0.2, "guide/share": 0.2}, []),
        ({"policy/truncated": 0.3, "reward/equal_groups": 0.5}, ["data.response_len=16"]),
        ({"policy/truncated": 0.0, "reward/equal_groups": 0.9}, ["rl.group_size=4"]),
        (
            {"policy/truncated": 0.0, "reward/equal_groups": 0.9, "guide/failing": 0.0, "guide/share": 0.0},
            ["rl.temperature=1.0", "guidance.threshold=0.5"],
        ),
    ],
)
def test_warnings_of_the_first_rollout_name_what_to_change(figures, warnings):
    first, *found = run.first_look(config(), figures)
    assert "before the first update" in first and len(found) == len(warnings)
    assert all(field in line for field, line in zip(warnings, found, strict=True))


def report(total, fits=False, chip=CHIP):
    memory = Memory(0.2 * total, 0.4 * total, 0.0, 0.05 * total, 0.4 * total, total)
    return Report(chip, 8, {"data": 8, "fsdp": 1, "tensor": 1}, memory, fits, {}, 1)


@pytest.mark.parametrize(
    ("message", "temporaries"),
    [("Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded by 4.75G.", False),
     ("the total memory required for HLO temporaries (20.50G) exceeds available HBM (15.75G).", True)],
)  # fmt: skip
def test_a_program_that_the_compiler_finds_too_large(uncompiled, monkeypatch, message, temporaries):
    def too_large(_):
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {message}")

    monkeypatch.setattr(_Program, "compile", too_large)
    found = compile.compile_step(config(), jax.devices()[:1], CHIP)
    memory = found.memory
    assert not found.fits and not found.phases and memory.parameters > 0
    assert (memory.temporaries if temporaries else memory.total) == pytest.approx(20.5 * 2**30)
    assert memory.total == memory.parameters + memory.optimiser + memory.inputs + memory.temporaries


def test_what_makes_it_fit_is_found_in_four_trials_at_most():
    tried = []
    spread = dataclasses.replace(report(1.3e9), mesh={"data": 1, "fsdp": 8, "tensor": 1})

    def third_fits(c):
        tried.append((c.mesh.fsdp, c.mesh.gather_decode, c.policy.remat, c.rl.micro_batches, c.rl.group_size))
        return report(1.0e9, fits=True) if len(tried) == 3 else spread

    large = config(**{"rl.batch_size": 64, "rl.group_size": 8})
    changes, found = compile.make_it_fit(large, report(1.5e9), third_fits)
    assert found.fits and len(tried) == len(set(tried)) == 3
    assert changes["mesh.fsdp"] == -1 and changes["mesh.data"] == 1  # most of the memory is state
    assert large.mesh.fsdp == 1  # the given config is not changed
    tried.clear()
    changes, found = compile.make_it_fit(large, report(9e9), lambda c: (tried.append(c), report(9e9))[1])
    assert not found.fits and 1 <= len(tried) <= 4


def test_what_is_offered_could_be_run_and_never_shortens_prompts():
    large = config(**{"rl.batch_size": 32, "rl.group_size": 8, "rl.micro_batches": 2})
    memory = dataclasses.replace(report(1.0).memory, total=9e9, cache=8e9)
    offered = [fields for _, fields in compile._possible(large, dataclasses.replace(report(9e9), memory=memory))]
    assert {"rl.batch_size": 16} in offered and {"rl.micro_batches": 4} in offered and {"rl.group_size": 4} in offered
    assert not any("data.prompt_len" in fields for fields in offered)
    large.rl.micro_batches = 4  # half the batch cannot be split into so many pieces
    offered = [fields for _, fields in compile._possible(large, report(9e9))]
    assert offered and not any("rl.batch_size" in fields for fields in offered)


@pytest.mark.parametrize(("stats", "memory"), [({"bytes_limit": 60e9}, 60e9), (None, 80e9)])
def test_the_memory_of_a_device_is_what_jax_may_take(monkeypatch, stats, memory):
    device = SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3", memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert compile.find_devices("")[1] == dataclasses.replace(CHIPS[device.device_kind], memory=memory)


def test_the_batch_counts_as_an_input(uncompiled):
    inputs = {
        size: compile.compile_step(config(**{"rl.batch_size": size}), jax.devices()[:1], CHIP).memory.inputs
        for size in (8, 16)
    }
    small = config()
    # Each example has its tokens and truth (S + T), the ends of 5 parts, 4 steps, and 6 single numbers.
    numbers = small.data.prompt_len + small.data.response_len + 5 + 4 + 6
    assert inputs[16] - inputs[8] == 8 * 4 * numbers


def test_a_torn_log_is_read_to_its_last_whole_row_and_a_damaged_one_is_named(tmp_path):
    log = tmp_path / "metrics.jsonl"
    rows = [{"stage": "rl", "step": step, "time/step_s": seconds} for step, seconds in enumerate((9, 2, 4), 1)]
    whole = "".join(json.dumps(row) + "\n" for row in rows)
    log.write_text(whole + '{"stage": "rl", "st')
    assert preflight.measured_seconds(str(tmp_path)) == 3
    log.write_text("{" + whole)
    with pytest.raises(ConfigError, match=f"{log}, line 1: not JSON"):
        preflight.measured_seconds(str(tmp_path))


def test_a_topology_that_there_is_not():
    with pytest.raises(ValueError, match="--topology=v9z:4x4: .* such as v5e:4x4"):
        compile.find_devices("v9z:4x4")


def test_shapes_of_models_that_are_not_here():
    sizes = {}
    for file in sorted((ROOT / "configs" / "shapes").glob("*.json")):
        _, init, _ = transformer.build(loading.read_config(file))
        sizes[file.stem] = transformer.count_parameters(jax.eval_shape(init, jax.random.key(0)))
    assert sizes == {"qwen3_0p6b": 596_049_920, "qwen3_30b_a3b": 30_532_122_624, "qwen3_8b": 8_190_735_360}


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "agrl_jax.preflight", f"--config={ROOT / 'tests' / 'tiny.py'}", *arguments],
        env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=500, cwd=ROOT,
    )


@pytest.mark.slow
def test_the_devices_at_hand_and_a_run_on_them(tmp_path):
    rows = [{"stage": "rl", "step": step, "time/step_s": seconds} for step, seconds in enumerate((9, 2, 3, 4), 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = command(f"--workdir={tmp_path}", f"--out={tmp_path / 'out.json'}")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["measured"] == 3 and 0 < found["seconds"] < 3
    assert f"{3 / found['seconds']:.1f} times the bound" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs pip install -e '.[preflight]'")
def test_the_step_compiles_for_sixteen_tpus(tmp_path):
    fields = {"mesh.data": 8, "mesh.fsdp": 2, "rl.batch_size": 32, "policy.compute_dtype": "bfloat16"}
    fields |= {"sft.batch_size": 16, "eval.batch_size": 16}
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    done = command("--topology=v5e:4x4", f"--out={tmp_path / 'out.json'}", *overrides)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["fits"] and found["devices"] == 16 and found["chip"]["name"] == "v5e"
    width, layer = 32, 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64  # matrices, split over fsdp; norms of heads are not
    matrices = 2 * layer + 2 * 600 * width + 5 * width
    assert found["memory"]["parameters"] == 4 * (matrices / 2 + 2 * 2 * 16)
    assert 0 < found["memory"]["total"] < CHIPS["TPU v5 lite"].memory
    loss = found["phases"]["loss"]
    assert sum(loss["collectives"].values()) > 0 and loss["bytes"] > 0
    assert found["phases"]["decode"]["flops"] > 0
    assert sum(phase["seconds"] for phase in found["phases"].values()) == pytest.approx(found["seconds"])
