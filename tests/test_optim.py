"""The optimiser against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agrl_jax.runtime import optim


def test_schedule_rises_without_a_zero_step_and_falls_along_a_cosine():
    rate = optim.learning_rate_schedule(peak=8.0, warmup=4, steps=8)
    # Warm-up 1/4, 2/4, 3/4, 4/4 of the peak; then half a cosine over 4 updates: 1, (1 + cos 45)/2, 1/2, ..., 0.
    by_hand = [2, 4, 6, 8, 8, 4 * (1 + np.sqrt(0.5)), 4, 4 * (1 - np.sqrt(0.5)), 0, 0]
    np.testing.assert_allclose([float(rate(t)) for t in range(10)], by_hand, atol=1e-6)


def test_constant_schedule_stays_at_the_peak():
    rate = optim.learning_rate_schedule(peak=3.0, warmup=2, steps=4, schedule="constant")
    np.testing.assert_allclose([float(rate(t)) for t in range(6)], [1.5, 3, 3, 3, 3, 3])


def test_warmup_longer_than_the_run_only_rises():
    rate = optim.learning_rate_schedule(peak=1.0, warmup=10, steps=5)
    np.testing.assert_allclose([float(rate(t)) for t in range(5)], [0.1, 0.2, 0.3, 0.4, 0.5], rtol=1e-6)


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="schedule='linear', expected cosine or constant"):
        optim.learning_rate_schedule(1.0, 0, 1, "linear")


def test_first_step_is_the_learning_rate_against_the_sign_of_the_gradient_plus_decay():
    tx = optim.make(0.1, warmup=0, steps=10, schedule="constant", weight_decay=0.5, clip_norm=1e9)
    params = {"matrix": jnp.full((1, 2), 2.0), "norm": jnp.full((2,), 2.0)}
    grads = {"matrix": jnp.array([[3.0, -3.0]]), "norm": jnp.array([3.0, -3.0])}
    updates, _ = tx.update(grads, tx.init(params), params)
    # Adam's first step is g / |g|. The matrix decays too: -0.1 * (sign + 0.5 * 2).
    np.testing.assert_allclose(updates["matrix"], [[-0.2, 0.0]], atol=1e-6)
    np.testing.assert_allclose(updates["norm"], [-0.1, 0.1], atol=1e-6)


def test_two_adam_steps_with_clipping_by_hand():
    tx = optim.make(1.0, warmup=0, steps=1, schedule="constant", clip_norm=1.0, b1=0.5, b2=0.75)
    params = {"w": jnp.zeros((2,))}
    state = tx.init(params)
    _, state = tx.update({"w": jnp.array([3.0, 4.0])}, state, params)  # clipped to 0.6, 0.8
    updates, _ = tx.update({"w": jnp.array([0.0, 0.5])}, state, params)  # not clipped
    # m = (0.5 * 0.5 * g1 + 0.5 * g2) / (1 - 0.25);  v = (0.75 * 0.25 * g1^2 + 0.25 * g2^2) / (1 - 0.5625).
    m = np.array([0.15, 0.2 + 0.25]) / 0.75
    v = np.array([0.0675, 0.12 + 0.0625]) / 0.4375
    np.testing.assert_allclose(updates["w"], -m / np.sqrt(v), rtol=1e-5)


def test_no_clipping_and_an_eps_by_hand():
    tx = optim.make(1.0, warmup=0, steps=1, schedule="constant", clip_norm=0.0, eps=2.0)
    params = {"w": jnp.zeros((1,))}
    updates, _ = tx.update({"w": jnp.array([6.0])}, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], [-6 / (6 + 2)], rtol=1e-6)


def test_bfloat16_moments_follow_those_of_float32():
    params, gradients = {"w": jnp.zeros((64,))}, np.random.default_rng(0).normal(size=(30, 64))
    found = {}
    for dtype in ("float32", "bfloat16"):
        tx = optim.make(1.0, warmup=0, steps=1, schedule="constant", clip_norm=0.0, moments=dtype)
        state = tx.init(params)
        for gradient in gradients:
            updates, state = tx.update({"w": jnp.asarray(gradient, jnp.float32)}, state, params)
        assert {x.dtype for x in jax.tree.leaves(state) if x.ndim} == {jnp.dtype(dtype)}
        assert updates["w"].dtype == jnp.float32
        found[dtype] = np.asarray(updates["w"])
    assert 0 < np.abs(found["bfloat16"] - found["float32"]).max() < 0.02


def test_bfloat16_moments_leave_the_coefficients_of_muon_as_they_are():
    params, axes = {"w": jnp.ones((2, 4, 4))}, {"w": ("layers", "embed", "mlp")}
    gradient = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4)), jnp.float32)}
    found = []
    for dtype in ("float32", "bfloat16"):
        tx = optim.make(1.0, warmup=0, steps=1, matrix_rate=0.1, axes=axes, clip_norm=0.0, moments=dtype)
        found.append(tx.update(gradient, tx.init(params), params)[0]["w"])
    np.testing.assert_array_equal(*found)  # the first update has no moment of an earlier one


def test_adafactor_scales_by_means_of_rows_and_columns():
    """It keeps only rows and columns. So gradients of rank 1 are known exactly, and each step is their sign."""
    tx = optim.make(0.5, warmup=0, steps=1, schedule="constant", clip_norm=0.0, kind="adafactor")
    rng = np.random.default_rng(0)
    rows, columns = rng.normal(size=(130, 1)), rng.normal(size=(1, 128))
    params = {"w": jnp.zeros((130, 128)), "norm": jnp.zeros((3,))}
    grads = {"w": jnp.asarray(rows * columns, jnp.float32), "norm": jnp.array([3.0, -0.5, 2.0])}
    state = tx.init(params)
    updates, _ = tx.update(grads, state, params)
    np.testing.assert_allclose(updates["w"], -0.5 * np.sign(grads["w"]), rtol=1e-4)
    np.testing.assert_allclose(updates["norm"], [-0.5, 0.5, -0.5], rtol=1e-4)
    assert sum(x.size for x in jax.tree.leaves(state)) < 130 + 128 + 3 + 10


def test_only_matrices_decay_by_logical_axes():
    axes = {
        "embedding": ("vocab", "embed"),
        "q": ("layers", "embed", "heads", "head_dim"),
        "bias": ("layers", "heads", "head_dim"),
        "norm": ("layers", "embed"),
    }
    assert optim.decay_mask(axes) == {"embedding": True, "q": True, "bias": False, "norm": False}


def test_decay_mask_overrides_the_count_of_dimensions():
    params = {"stacked_norm": jnp.ones((2, 2)), "q": jnp.ones((2, 2))}
    tx = optim.make(1.0, 0, 1, "constant", weight_decay=0.5, decay={"stacked_norm": False, "q": True})
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["stacked_norm"], 0.0)
    np.testing.assert_allclose(updates["q"], -0.5)


@pytest.mark.parametrize("decay", [None, {"norm": False, "embedding": True, "w": True}])
def test_only_matrices_decay_beside_muon_too(decay):
    axes = {"w": ("layers", "embed", "mlp"), "embedding": ("vocab", "embed"), "norm": ("embed",)}
    params = {"w": jnp.ones((2, 4, 4)), "embedding": jnp.ones((3, 4)), "norm": jnp.ones(4)}
    tx = optim.make(0.5, 0, 1, "constant", weight_decay=0.1, decay=decay, matrix_rate=0.2, axes=axes)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["norm"], 0.0)
    np.testing.assert_allclose(updates["embedding"], -0.05)
    np.testing.assert_allclose(updates["w"], -0.02, rtol=1e-6)


def test_matrices_of_the_layers_map_input_to_output_and_nothing_else_is_a_matrix():
    axes = {
        "embedding": ("vocab", "embed"),
        "q": ("layers", "embed", "heads", "head_dim"),
        "out": ("layers", "heads", "head_dim", "embed"),
        "expert": ("layers", "experts", "expert_mlp", "embed"),
        "norm": ("layers", "embed"),
        "bias": ("layers", "heads", "head_dim"),
    }
    assert optim.matrix_dimensions(axes) == {
        "embedding": None, "q": ((1,), (2, 3)), "out": ((1, 2), (3,)), "expert": ((2,), (3,)), "norm": None,
        "bias": None,
    }  # fmt: skip


def test_muon_turns_each_layers_gradient_into_a_rotation_and_leaves_the_rest_to_nadam():
    axes = {"w": ("layers", "embed", "mlp"), "embedding": ("vocab", "embed")}
    tx = optim.make(0.1, 0, 10, "constant", matrix_rate=0.5, axes=axes, clip_norm=1e9)
    rng = np.random.default_rng(0)
    params = {"w": jnp.zeros((2, 4, 4)), "embedding": jnp.zeros((3, 4))}
    grads = {name: jnp.asarray(rng.normal(size=x.shape), jnp.float32) for name, x in params.items()}
    updates, _ = tx.update(grads, tx.init(params), params)
    nesterov = 1 + 0.9 * 0.1 / (1 - 0.9**2)  # times g / |g|: the first moment, one step ahead
    np.testing.assert_allclose(updates["embedding"], -0.1 * nesterov * np.sign(grads["embedding"]), rtol=1e-5)
    for update, gradient in zip(updates["w"], grads["w"], strict=True):
        u, _, v = np.linalg.svd(gradient)
        # The directions are the same; lengths are the rate times 0.7 to 1.2, after five Newton-Schulz iterations.
        lengths = np.diag(u.T @ np.asarray(update) @ v.T)
        assert np.all((-lengths > 0.5 * 0.6) & (-lengths < 0.5 * 1.3))


def test_state_is_float32_for_bfloat16_parameters():
    tx = optim.make(0.1, 0, 1, weight_decay=0.1)
    params = {"w": jnp.ones((2, 2), jnp.bfloat16)}
    state = tx.init(params)
    grads = {"w": jnp.full((2, 2), 1e-3, jnp.bfloat16)}
    new_params, state, *_ = optim.guarded_update(tx, grads, params, state, jnp.int32(0))
    assert {x.dtype for x in jax.tree.leaves(state) if x.ndim} == {jnp.dtype(jnp.float32)}
    assert new_params["w"].dtype == jnp.bfloat16


# -------------------------------------------------------------------------------------- guarded update


@pytest.fixture
def sgd():
    params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([[3.0]])}
    tx = optax.chain(optax.trace(decay=0.9), optax.scale(-0.1))
    return tx, params, tx.init(params)


def test_finite_update_is_made_and_resets_the_count(sgd):
    tx, params, state = sgd
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}
    step = jax.jit(lambda *args: optim.guarded_update(tx, *args))
    new_params, new_state, skipped, stats = step(grads, params, state, jnp.int32(2))
    np.testing.assert_allclose(new_params["a"], [0.7, 2.0], rtol=1e-6)
    np.testing.assert_allclose(new_params["b"], [[2.6]], rtol=1e-6)
    np.testing.assert_allclose(new_state[0].trace["a"], [3.0, 0.0])
    assert int(skipped) == 0 and skipped.dtype == jnp.int32
    np.testing.assert_allclose([stats["grad_norm"], stats["update_norm"], stats["finite"]], [5.0, 0.5, 1.0], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])  # 3e38 is finite, its square is not
def test_one_bad_gradient_skips_the_whole_update(sgd, bad):
    tx, params, state = sgd
    state = (state[0]._replace(trace=jax.tree.map(jnp.ones_like, params)), state[1])
    grads = {"a": jnp.array([1.0, bad]), "b": jnp.array([[1.0]])}
    step = jax.jit(lambda *args: optim.guarded_update(tx, *args))
    new_params, new_state, skipped, stats = step(grads, params, state, jnp.int32(2))
    jax.tree.map(np.testing.assert_array_equal, (new_params, new_state), (params, state))
    assert int(skipped) == 3
    assert float(stats["finite"]) == 0.0 and float(stats["update_norm"]) == 0.0
    assert not np.isfinite(stats["grad_norm"])


def test_a_skipped_update_does_not_advance_the_schedule():
    tx = optim.make(0.1, warmup=4, steps=10)
    params = {"w": jnp.ones((2,))}
    state = tx.init(params)
    _, after, *_ = optim.guarded_update(tx, {"w": jnp.array([jnp.nan, 0.0])}, params, state, jnp.int32(0))
    jax.tree.map(np.testing.assert_array_equal, after, state)
