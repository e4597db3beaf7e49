"""Checkpoints: exact, limited in number, whole or absent, and tied to the run that they belong to."""

import errno
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agrl_jax.runtime import optim
from agrl_jax.runtime.checkpoint import Checkpointer, CheckpointError, CheckpointMismatch
from agrl_jax.types import GuidanceState, TrainState

IDENTITY = {
    "config": {"seed": 0, "rl": {"steps": 100, "group_size": 8}, "sft": {"steps": 10}, "eval": {"every": 5}},
    "rulebook": "abc",
    "versions": {"jax": "1"},
}


def make_state(seed: int = 0, guided: bool = True) -> TrainState:
    params = {"w": jax.random.normal(jax.random.key(seed), (4, 3)), "b": {"c": jnp.ones((3,), jnp.bfloat16)}}
    guidance = GuidanceState(
        level=jnp.full((2,), 1.5), offset=jnp.arange(5, dtype=jnp.int8), memory=-jnp.ones((5,), jnp.int8)
    )
    return TrainState(
        params=params,
        opt_state=optim.make(1e-3, 2, 10).init(params),
        step=jnp.int32(seed),
        key=jax.random.key_data(jax.random.key(seed)),
        guidance=guidance if guided else None,
        skipped=jnp.int32(0),
    )


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def steps_on_disk(workdir: Path, stage: str) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints" / stage).iterdir())


# ---------------------------------------------------------------------------------- saving and restoring


@pytest.mark.parametrize("guided", [True, False])
def test_a_state_comes_back_exactly(tmp_path, guided):
    state = make_state(3, guided)
    with Checkpointer(tmp_path, identity=IDENTITY) as checkpoints:
        assert checkpoints.restore(state) is None
        checkpoints.save("rl", 7, state, data_position={"epoch": 1, "row": np.int64(12)})
    with Checkpointer(tmp_path, identity=IDENTITY) as checkpoints:
        assert checkpoints.newest() == ("rl", 7)
        template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        found = checkpoints.restore(template)
    assert found[:2] == ("rl", 7) and found.data_position == {"epoch": 1, "row": 12}
    assert_same(found.state, state)


def test_a_state_of_a_version_without_memory_of_difficulty_comes_back(tmp_path):
    state = make_state(3)
    older = {field: value for field, value in vars(state).items() if field != "difficulty"}
    with Checkpointer(tmp_path, identity=IDENTITY) as checkpoints:
        checkpoints.save("rl", 7, older)
        assert_same(checkpoints.restore(state).state, state)


def test_the_state_may_be_donated_once_save_returns(tmp_path):
    state = {"w": jnp.zeros((512, 512))}
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    with Checkpointer(tmp_path, keep=5, identity=IDENTITY) as checkpoints:
        for done in range(1, 5):
            state = step(state)
            checkpoints.save("rl", done, state)
        for done in range(1, 5):
            found = checkpoints.restore(state, "rl", done)
            np.testing.assert_array_equal(found.state["w"], np.full((512, 512), done))


def test_the_last_few_and_the_best_are_kept(tmp_path):
    scores = {1: 0.2, 2: 0.9, 3: None, 4: 0.3, 5: float("nan"), 6: None}
    with Checkpointer(tmp_path, keep=2, identity=IDENTITY) as checkpoints:
        for step, score in scores.items():
            checkpoints.save("rl", step, {"x": jnp.int32(step)}, metrics=None if score is None else {"macro_f1": score})
        checkpoints.wait()
        assert steps_on_disk(tmp_path, "rl") == [2, 5, 6]
    with Checkpointer(tmp_path, keep=2, identity=IDENTITY) as checkpoints:  # after a restart, the best is still known
        assert checkpoints.best_step("rl") == 2
        checkpoints.save("rl", 7, {"x": jnp.int32(7)}, metrics={"macro_f1": 0.95})
        checkpoints.wait()
        assert steps_on_disk(tmp_path, "rl") == [6, 7]
        assert checkpoints.best_step("rl") == 7


def test_stages_count_apart_and_the_end_of_the_supervised_one_is_kept(tmp_path):
    with Checkpointer(tmp_path, keep=1, identity=IDENTITY) as checkpoints:
        checkpoints.save("sft", 10, make_state(1))
        assert checkpoints.restore_sft(make_state().params) is None
        checkpoints.save_sft(make_state(1).params)
        assert checkpoints.newest() == ("sft", 10) and checkpoints.sft_ended
        for step in (1, 2, 3):
            checkpoints.save("rl", step, make_state(2))
        assert checkpoints.newest() == ("rl", 3)
        assert_same(checkpoints.restore_sft(make_state().params), make_state(1).params)
        assert checkpoints.restore(make_state(), "sft")[:2] == ("sft", 10)
    assert steps_on_disk(tmp_path, "rl") == [3] and steps_on_disk(tmp_path, "sft") == [10]


def test_a_supervised_stage_of_no_steps_may_end(tmp_path):
    with Checkpointer(tmp_path, identity=IDENTITY) as checkpoints:
        checkpoints.save_sft(make_state().params)
    with Checkpointer(tmp_path, identity=IDENTITY) as checkpoints:
        assert checkpoints.newest() == ("sft", 0)
        assert checkpoints.restore(make_state()) is None


def test_a_step_saved_twice_is_saved_once_and_an_earlier_one_is_refused(tmp_path):
    with Checkpointer(tmp_path, identity=IDENTITY) as checkpoints:
        checkpoints.save("rl", 2, {"x": jnp.int32(1)})
        checkpoints.save("rl", 2, {"x": jnp.int32(2)})
        assert int(checkpoints.restore({"x": jnp.int32(0)}).state["x"]) == 1
        with pytest.raises(CheckpointError, match="already holds steps past 1"):
            checkpoints.save("rl", 1, {"x": jnp.int32(1)})


def test_parameters_alone_are_restored_for_reading_and_nothing_is_written(tmp_path):
    state = make_state(5)
    with Checkpointer(tmp_path, identity=IDENTITY) as checkpoints:
        checkpoints.save("rl", 1, state)
    before = sorted(tmp_path.rglob("*"))
    with Checkpointer(tmp_path) as checkpoints:
        assert_same(checkpoints.restore_params(state.params, "rl"), state.params)
        assert checkpoints.record("rl", 1)["identity"] == IDENTITY
        with pytest.raises(CheckpointError, match="sft holds no checkpoint"):
            checkpoints.restore_params(state.params, "sft")
    with Checkpointer(tmp_path / "nowhere") as checkpoints:
        assert checkpoints.newest() is None
    assert sorted(tmp_path.rglob("*")) == before


def test_what_does_not_fit_is_refused(tmp_path):
    with Checkpointer(tmp_path, identity=IDENTITY) as checkpoints:
        checkpoints.save("rl", 1, {"w": jnp.ones((4, 3))})
        with pytest.raises(CheckpointError, match="has no checkpoint of step 9; there: 1"):
            checkpoints.restore({"w": jnp.ones((4, 3))}, "rl", 9)
        with pytest.raises(CheckpointError, match="cannot be restored"):
            checkpoints.restore({"w": jnp.ones((4, 2))})
        with pytest.raises(CheckpointError, match=r"whose state has other fields \(other, w\)") as error:
            checkpoints.restore({"other": jnp.ones((4, 3))})
        assert len(str(error.value).splitlines()) == 1


# ---------------------------------------------------------------------------------------------- identity


def changed(**fields):
    """IDENTITY with dotted fields set; `__` stands for the dot."""
    identity = {**IDENTITY, "config": {k: dict(v) if isinstance(v, dict) else v for k, v in IDENTITY["config"].items()}}
    for name, value in fields.items():
        *path, last = name.split("__")
        node = identity
        for part in path:
            node = node[part]
        node[last] = value
    return identity


@pytest.fixture
def saved(tmp_path):
    with Checkpointer(tmp_path, identity=IDENTITY) as checkpoints:
        checkpoints.save("sft", 5, {"x": jnp.int32(1)})
    return tmp_path


def test_another_config_or_rule_book_is_refused_by_field(saved):
    with pytest.raises(CheckpointMismatch) as error:
        Checkpointer(saved, identity=changed(config__rl__group_size=16, rulebook="xyz", config__eval__every=1))
    lines = str(error.value).splitlines()
    assert str(saved) in lines[0] and "belong to another run" in lines[0]
    assert [line.strip() for line in lines[1:]] == ["rl.group_size: 8 -> 16", "rulebook: abc -> xyz"]


def test_a_field_that_came_or_went_is_refused(saved):
    with pytest.raises(CheckpointMismatch, match=r"new: \(absent\) -> 1"):
        Checkpointer(saved, identity=changed(config__new=1))


def test_a_field_that_an_older_version_lacked_compares_with_its_default(saved):
    defaults = {"config": {"new": 1, "rl": {"group_size": 16}}}
    Checkpointer(saved, identity=changed(config__new=1), defaults=defaults).close()
    with pytest.raises(CheckpointMismatch, match=r"\n  new: 1 -> 2$"):
        Checkpointer(saved, identity=changed(config__new=2), defaults=defaults)


def test_a_part_that_is_known_later_is_checked_then_and_only_where_it_was_saved(saved):
    with Checkpointer(saved, identity=IDENTITY) as checkpoints:
        checkpoints.identify({"pairs": {"train": "abc", "test": "def"}})  # the checkpoint has no record of pairs
        checkpoints.save("sft", 6, {"x": jnp.int32(1)})
    with Checkpointer(saved, identity=IDENTITY) as checkpoints:
        checkpoints.identify({"pairs": {"train": "abc", "test": "def"}})
        with pytest.raises(CheckpointMismatch, match=r"\n  pairs.train: abc -> xyz$"):
            checkpoints.identify({"pairs": {"train": "xyz", "test": "def"}})


@pytest.mark.parametrize(
    "identity",
    [
        changed(config__eval__every=50, versions={"jax": "2"}),
        changed(config__rl__steps=200, config__sft__steps=20),
        changed(config__log={"every": 3}),
        changed(config__rl__micro_batches=8, config__objective={"logprob_chunk": 64}, config__policy={"remat": True}),
    ],
)
def test_what_is_watched_may_change_and_stages_may_grow(saved, identity):
    with Checkpointer(saved, identity=identity) as checkpoints:
        assert checkpoints.newest() == ("sft", 5)


def test_a_budget_of_zero_has_no_end(tmp_path):
    with Checkpointer(tmp_path, identity=changed(config__rl__budget=100)) as checkpoints:
        checkpoints.save("sft", 1, make_state(1))
    with Checkpointer(tmp_path, identity=changed(config__rl__budget=0)) as checkpoints:
        checkpoints.save("sft", 2, make_state(2))
    with pytest.raises(CheckpointMismatch, match="rl.budget: 0 -> 100"):
        Checkpointer(tmp_path, identity=changed(config__rl__budget=100))


def test_a_stage_may_not_shrink_and_one_that_is_over_may_not_grow(saved):
    with pytest.raises(CheckpointMismatch, match="rl.steps: 100 -> 50"):
        Checkpointer(saved, identity=changed(config__rl__steps=50))
    with Checkpointer(saved, identity=IDENTITY) as checkpoints:
        checkpoints.save_sft({"x": jnp.int32(1)})
    with pytest.raises(CheckpointMismatch, match="sft.steps: 10 -> 20"):
        Checkpointer(saved, identity=changed(config__sft__steps=20))


def test_what_comes_after_a_warm_start_may_change_until_it_has_begun(saved):
    other = changed(config__rl__group_size=16, config__rl__steps=50)
    with Checkpointer(saved, identity=IDENTITY) as checkpoints:
        checkpoints.save_sft({"x": jnp.int32(1)})
    with pytest.raises(CheckpointMismatch, match="rulebook"):
        Checkpointer(saved, identity={**other, "rulebook": "xyz"})
    with Checkpointer(saved, identity=other) as checkpoints:
        checkpoints.save("rl", 1, make_state(1))
    with pytest.raises(CheckpointMismatch, match="rl.group_size: 16 -> 8"):
        Checkpointer(saved, identity=IDENTITY)


# ---------------------------------------------------------------------------------------- what goes wrong


def test_a_half_written_checkpoint_is_not_loaded_and_is_cleared(tmp_path):
    with Checkpointer(tmp_path, identity=IDENTITY) as checkpoints:
        checkpoints.save("rl", 1, make_state(1))
        checkpoints.save("rl", 2, make_state(2))
    folder = tmp_path / "checkpoints" / "rl"
    (folder / "2").rename(folder / "2.orbax-checkpoint-tmp")  # Orbax's name for an unfinished one
    with Checkpointer(tmp_path, identity=IDENTITY) as checkpoints:
        found = checkpoints.restore(make_state())
        assert found.step == 1
        assert_same(found.state, make_state(1))
        checkpoints.save("rl", 2, make_state(2))
        assert checkpoints.restore(make_state()).step == 2
    assert steps_on_disk(tmp_path, "rl") == [1, 2]


def test_a_truncated_file_is_one_line_that_names_the_step_before(tmp_path):
    state = {"params": {"w": jax.random.normal(jax.random.key(0), (256, 256))}}
    with Checkpointer(tmp_path, identity=IDENTITY) as checkpoints:
        for step in (3, 7):
            checkpoints.save("rl", step, state)
    folder = tmp_path / "checkpoints" / "rl"
    (large,) = (path for path in (folder / "7").rglob("d/*") if path.stat().st_size > 20_000)
    os.truncate(large, 100)
    with Checkpointer(tmp_path, identity=IDENTITY) as checkpoints:
        for restore in (lambda: checkpoints.restore(state), lambda: checkpoints.restore_params(state["params"], "rl")):
            with pytest.raises(CheckpointError, match=r"rl/7 cannot be restored: .*to go on from step 3") as it:
                restore()
            assert len(str(it.value).splitlines()) == 1
    shutil.rmtree(folder / "7")
    with Checkpointer(tmp_path, identity=IDENTITY) as checkpoints:
        assert_same(checkpoints.restore(state).state, state)


def test_a_half_deleted_old_checkpoint_does_no_harm(tmp_path):
    with Checkpointer(tmp_path, keep=2, identity=IDENTITY) as checkpoints:
        checkpoints.save("rl", 1, make_state(1), metrics={"macro_f1": 0.1})
        checkpoints.save("rl", 2, make_state(2), metrics={"macro_f1": 0.2})
    for path in sorted((tmp_path / "checkpoints" / "rl" / "1").rglob("*"), reverse=True):
        if path.is_file():
            path.unlink()
    with Checkpointer(tmp_path, keep=1, identity=IDENTITY) as checkpoints:
        assert checkpoints.best_step("rl") == 2
        assert_same(checkpoints.restore(make_state()).state, make_state(2))
        checkpoints.save("rl", 3, make_state(3), metrics={"macro_f1": 0.1})
    assert steps_on_disk(tmp_path, "rl") == [2, 3]


def test_no_space_left_is_one_clear_error_and_the_last_good_checkpoint_survives(tmp_path, monkeypatch):
    """The disk fills up in Orbax's background thread, as it moves the finished checkpoint into place."""

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoints = Checkpointer(tmp_path, keep=1, identity=IDENTITY)
    checkpoints.save("rl", 1, make_state(1))
    checkpoints.wait()
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", full)
        patch.setattr(os, "replace", full)
        patch.setattr(Path, "rename", full)
        checkpoints.save("rl", 2, make_state(2))
        with pytest.raises(CheckpointError) as error:
            checkpoints.wait()
    checkpoints.close()
    message = str(error.value)
    assert message.startswith("checkpoint of rl step 2 could not be written to ")
    assert message.endswith("no space left on device; the last complete one, rl step 1, is intact")
    with Checkpointer(tmp_path, identity=IDENTITY) as checkpoints:
        assert_same(checkpoints.restore(make_state()).state, make_state(1))


def test_an_error_on_its_way_out_is_not_hidden_by_a_failed_save(tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpointer, "close", lambda self: (_ for _ in ()).throw(CheckpointError("full")))
    with pytest.raises(KeyError, match="first"), Checkpointer(tmp_path, identity=IDENTITY):
        raise KeyError("first")
    with pytest.raises(CheckpointError, match="full"), Checkpointer(tmp_path, identity=IDENTITY):
        pass


SAVE_FOREVER = """
import sys
import jax.numpy as jnp
from agrl_jax.runtime.checkpoint import Checkpointer
checkpoints = Checkpointer(sys.argv[1], keep=1, identity={"config": {}})
start = (checkpoints.newest() or ("rl", 0))[1]
for step in range(start + 1, 10_000):
    state = {f"w{i}": jnp.full((64, 1024), float(step)) for i in range(8)}
    checkpoints.save("rl", step, state, data_position=step)
    print(step, flush=True)
"""


@pytest.mark.parametrize("delay_ms", [3, 10, 24])
def test_a_run_killed_while_saving_leaves_whole_checkpoints_only(tmp_path, delay_ms):
    command = [sys.executable, "-c", SAVE_FOREVER, str(tmp_path)]
    begun = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            begun = int(line)
            if begun == 6:
                break
        time.sleep(delay_ms / 1000)  # stops during one of the next saves
        process.kill()
    template = {f"w{i}": jnp.zeros((64, 1024)) for i in range(8)}
    with Checkpointer(tmp_path, identity={"config": {}}) as checkpoints:
        found = checkpoints.restore(template)
    assert found.step >= begun - 1  # `save` waits for the one before it
    assert found.data_position == found.step
    for leaf in found.state.values():
        np.testing.assert_array_equal(leaf, np.full((64, 1024), found.step))
