"""Every way to run the same tokens through the policy gives the same, whatever the shape of the model."""

from __future__ import annotations

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agrl_jax.policy import transformer
from agrl_jax.policy.attention import scaled
from agrl_jax.policy.decoding import for_decoding
from agrl_jax.policy.layers import PolicyConfig, RopeScaling, rms_norm
from agrl_jax.policy.scoring import predicting_hidden, prefill, run_groups
from agrl_jax.policy.transformer import build, count_parameters

pytestmark = pytest.mark.usefixtures("scanned")

BASE = PolicyConfig(vocab_size=23, width=20, layers=3, heads=4, kv_heads=2, head_dim=6, mlp=28)
VARIANTS = {
    "bias, all heads": {"bias": True, "kv_heads": 4},
    "qk_norm, unrolled layers, scaled rope": {
        "qk_norm": True, "layers": 2, "rope_scaling": RopeScaling("llama3", 4.0, original=4)
    },
    "norms after, norms over all heads": {"norms": "after", "qk_norm_whole": True, "tied": False},
    "window, norms on both sides": {
        "norms": "both", "norm_offset": 1.0, "qk_norm": True, "activation": "gelu_tanh", "scaled_embedding": True,
        "query_dim": 5, "window": 3, "global_every": 2, "local_rope_theta": 10.0,
    },
    "experts, untied, one kv head": {"experts": 3, "experts_per_token": 2, "tied": False, "kv_heads": 1},
}
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
PROMPT_LEN = np.array([4, 2], np.int32)


def drawn(cfg: PolicyConfig):
    """A policy in which no parameter is zero or one, so that each of them matters."""
    policy, init, axes = build(cfg)
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(init, jax.random.key(0))
    return policy, jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), shapes), axes


def tokens(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, BASE.vocab_size, shape).astype(np.int32)


def as_one_sequence(policy, params, prompt, prompt_len, response):
    """[B, G, T, D]: the hidden states that predict each response token, with each sample as a sequence of its own."""
    b, g, t = response.shape
    rows = []
    for i in range(b):
        n = int(prompt_len[i])
        whole = jnp.concatenate([jnp.broadcast_to(prompt[i, :n], (g, n)), response[i]], axis=1)
        hidden, _ = policy.apply(params, whole[:, None])
        rows.append(hidden[:, 0, n - 1 : n - 1 + t])
    return jnp.stack(rows)


# ------------------------------------------------------------------------------- one computation, many ways


@variants
def test_sharing_padding_and_caching_change_nothing(variant):
    policy, params, _ = drawn(dataclasses.replace(BASE, **variant))
    prompt, response = tokens((2, 4)), tokens((2, 3, 5), seed=1)
    padded = np.pad(prompt, ((0, 0), (0, 3)), constant_values=9)
    padded[1, PROMPT_LEN[1] :] = 17  # tokens after the prompt do not matter

    @jax.jit
    def all_ways(params):
        naive = as_one_sequence(policy, params, prompt, PROMPT_LEN, response)
        shared = predicting_hidden(policy, params, prefill(policy, params, padded, PROMPT_LEN), response)
        _, together = run_groups(policy, params, padded, PROMPT_LEN, response)
        prefix = prefill(policy, params, prompt, PROMPT_LEN)

        def decode(cache, t):
            token = jax.lax.dynamic_slice_in_dim(response, t, 1, axis=2)
            hidden, cache = policy.apply(params, token, offset=t, prefix=prefix, cache=cache)
            return cache, hidden[:, :, 0]

        empty = policy.init_cache(params, 2, 3, 5)
        cache, one_by_one = jax.lax.scan(decode, empty, jnp.arange(5))
        first, halfway = policy.apply(params, response[..., :2], prefix=prefix, cache=empty)
        second, in_pieces = policy.apply(params, response[..., 2:], offset=2, prefix=prefix, cache=halfway)
        _, fresh = policy.apply(params, response, prefix=prefix)
        decoded = jnp.moveaxis(one_by_one, 0, 2)
        pieces = jnp.concatenate([first, second], axis=2)
        return naive, shared, together, decoded, pieces, cache, in_pieces, fresh

    naive, shared, together, decoded, pieces, *caches = all_ways(params)
    np.testing.assert_allclose(shared, naive, atol=1e-5)
    np.testing.assert_allclose(together, naive, atol=1e-5)
    np.testing.assert_allclose(decoded[:, :, :-1], naive[:, :, 1:], atol=1e-5)
    np.testing.assert_allclose(pieces, decoded, atol=1e-5)
    for cache in caches[1:]:
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), cache, caches[0])


@variants
def test_laid_out_for_decoding_it_is_the_same_policy(variant):
    policy, params, _ = drawn(dataclasses.replace(BASE, **variant))
    prompt, response = tokens((2, 4)), tokens((2, 9, 5), seed=1)  # many rows first, then few

    @jax.jit
    def run(params):
        prefix = prefill(policy, params, prompt, PROMPT_LEN)
        hidden, cache = policy.apply(params, response[..., :4], prefix=prefix, cache=policy.init_cache(params, 2, 9, 5))
        last, cache = policy.apply(params, response[..., 4:], offset=4, prefix=prefix, cache=cache)
        return policy.unembed(params, jnp.concatenate([hidden, last], axis=2)), cache

    expected, stacked = run(params)
    for platform in ("cpu", "gpu"):
        logits, cache = run(for_decoding(params, platform))
        np.testing.assert_allclose(logits, expected, atol=1e-5, err_msg=platform)
        assert len(cache.k) == variant.get("layers", BASE.layers)
        np.testing.assert_allclose(jnp.stack(cache.k), stacked.k, atol=1e-5, err_msg=platform)


def test_rematerialisation_changes_no_gradient(close):
    _, params, _ = drawn(BASE)
    prompt, response = tokens((2, 4)), tokens((2, 3, 5), seed=1)

    def loss(policy, params):
        _, hidden = run_groups(policy, params, prompt, PROMPT_LEN, response)
        return jnp.mean(jax.nn.logsumexp(policy.unembed(params, hidden), axis=-1))

    def gradient(remat):
        policy, _, _ = build(dataclasses.replace(BASE, remat=remat))
        return jax.jit(jax.grad(partial(loss, policy)))(params)

    plain = gradient(remat=False)
    assert all(np.any(x) for x in jax.tree.leaves(plain))  # each parameter has a gradient
    close(gradient(remat=True), plain)


# ------------------------------------------------------------------------------------ shapes of model


@functools.cache
def compiled(cfg):
    policy, _, _ = build(cfg)
    return jax.jit(lambda params, x, offset: policy.unembed(params, policy.apply(params, x, offset=offset)[0]))


def run(cfg, params, sequence, offset=0):
    """Logits [n, V] of one sequence [n]."""
    return np.asarray(compiled(cfg)(params, sequence[None, None], offset))[0, 0]


def changed(params, **attention):
    """The parameters with weights of the attention replaced (None: removed)."""
    kept = {**params["blocks"]["attention"], **attention}
    kept = {name: value for name, value in kept.items() if value is not None}
    return {**params, "blocks": {**params["blocks"], "attention": kept}}


def test_a_group_of_query_heads_shares_its_keys_and_values():
    _, params, _ = drawn(BASE)
    attention = params["blocks"]["attention"]
    repeated = {name: np.repeat(attention[name], 2, axis=2) for name in "kv"}  # kv head j serves query heads 2j, 2j + 1
    all_heads = dataclasses.replace(BASE, kv_heads=4)
    expected = run(all_heads, changed(params, **repeated), tokens((4,)))
    np.testing.assert_allclose(run(BASE, params, tokens((4,))), expected, atol=1e-5)


def test_a_head_tied_by_hand_equals_a_tied_one():
    _, params, _ = drawn(BASE)
    untied = {**params, "head": params["embedding"].T}
    expected = run(dataclasses.replace(BASE, tied=False), untied, tokens((4,)))
    np.testing.assert_allclose(run(BASE, params, tokens((4,))), expected, atol=1e-5)


def test_biases_are_added_to_queries_keys_and_values():
    cfg = dataclasses.replace(BASE, bias=True)
    _, params, _ = drawn(cfg)
    names = ("q_bias", "k_bias", "v_bias")
    logits = {"all": run(cfg, params, tokens((4,)))}
    zeros = {name: np.zeros_like(params["blocks"]["attention"][name]) for name in names}
    for name in names:
        logits[name] = run(cfg, changed(params, **{name: zeros[name]}), tokens((4,)))
        assert np.abs(logits[name] - logits["all"]).max() > 1e-3
    without = run(BASE, changed(params, **dict.fromkeys(names)), tokens((4,)))
    np.testing.assert_allclose(run(cfg, changed(params, **zeros), tokens((4,))), without, atol=1e-6)


@pytest.mark.parametrize("shape", [(6,), (4, 6)], ids=["one axis", "over all heads"])
def test_the_gradient_of_a_norm_is_that_of_its_formula(shape, close):
    cfg = dataclasses.replace(BASE, norm_offset=0.5)
    rng = np.random.default_rng(0)
    x, weight, into = rng.normal(size=(2, 3, 4, 6)), rng.normal(size=shape), rng.normal(size=(2, 3, 4, 6))

    def formula(cfg, x, weight):
        mean = (x**2).mean(axis=tuple(range(-len(shape), 0)), keepdims=True)
        return x / jnp.sqrt(mean + cfg.norm_eps) * (cfg.norm_offset + weight)

    def gradient(norm):
        return jax.grad(lambda x, weight: jnp.sum(norm(cfg, x, weight) * into), argnums=(0, 1))(x, weight)

    close(gradient(rms_norm), gradient(formula), 1e-6)


def test_query_and_key_norms_forget_the_scale_of_their_projections():
    cfg = dataclasses.replace(BASE, qk_norm=True, norm_eps=1e-9)
    _, params, _ = drawn(cfg)
    attention = params["blocks"]["attention"]
    scaled = changed(params, q=5 * attention["q"], k=0.2 * attention["k"])
    np.testing.assert_allclose(run(cfg, scaled, tokens((4,))), run(cfg, params, tokens((4,))), atol=1e-5)
    doubled = changed(params, q_norm=2 * attention["q_norm"])
    assert np.abs(run(cfg, doubled, tokens((4,))) - run(cfg, params, tokens((4,)))).max() > 1e-3


def test_queries_in_bfloat16_are_scaled_in_float32():
    q = np.random.default_rng(0).normal(size=(100, 48)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(scaled(q, 48), (q.astype(np.float32) / np.float32(48**0.5)).astype(jnp.bfloat16))


def test_rotary_positions_see_distances_alone():
    _, params, _ = drawn(BASE)
    sequence = tokens((4,))
    here = run(BASE, params, sequence)
    np.testing.assert_allclose(run(BASE, params, sequence, offset=40), here, atol=1e-4)
    swapped = run(BASE, params, sequence[[1, 0, 2, 3]])  # the same tokens at other distances from the last
    assert np.abs(swapped[-1] - here[-1]).max() > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_types_of_parameters_states_and_logits(dtype):
    cfg = dataclasses.replace(BASE, param_dtype=dtype, compute_dtype=dtype)
    policy, init, _ = build(cfg)
    params = jax.eval_shape(init, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    cache = jax.eval_shape(lambda: policy.init_cache(params, 2, 3, 5))
    assert cache.k.shape == cache.v.shape == (3, 2, 3, 2, 5, 6) and cache.k.dtype == jnp.dtype(dtype)
    hidden, _ = jax.eval_shape(policy.apply, params, tokens((2, 3, 5)), cache=cache)
    assert hidden.shape == (2, 3, 5, 20) and hidden.dtype == jnp.dtype(dtype)
    logits = jax.eval_shape(policy.unembed, params, hidden)
    assert logits.shape == (2, 3, 5, 23) and logits.dtype == jnp.float32


@variants
def test_axes_name_the_dimensions_of_every_parameter(variant):
    cfg = dataclasses.replace(BASE, **variant)
    _, init, axes = build(cfg)
    params = jax.eval_shape(init, jax.random.key(0))
    sizes = {
        "layers": cfg.layers, "vocab": cfg.vocab_size, "embed": cfg.width, "heads": cfg.heads, "kv_heads": cfg.kv_heads,
        "head_dim": cfg.head_dim, "mlp": cfg.mlp, "experts": cfg.experts, "expert_mlp": cfg.mlp,
    }
    named = jax.tree.map(lambda names: tuple(sizes[name] for name in names), axes, is_leaf=lambda x: type(x) is tuple)
    assert named == jax.tree.map(lambda leaf: leaf.shape, params)


def test_parameters_are_counted():
    _, init, _ = build(BASE)
    attention = 20 * 4 * 6 + 2 * (20 * 2 * 6) + 4 * 6 * 20  # q, k and v, out
    layer = attention + 3 * 20 * 28 + 2 * 20  # feed-forward, two norms
    assert count_parameters(jax.eval_shape(init, jax.random.key(0))) == 23 * 20 + 3 * layer + 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_heads": 3}, "policy.kv_heads=3 must divide policy.heads=4"),
        ({"head_dim": 5}, "policy.head_dim=5 must be even"),
        ({"experts": 2, "experts_per_token": 3}, "policy.experts_per_token=3 must be 1 to 2"),
    ],
)
def test_shapes_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE, **change)


def test_layers_that_are_recomputed_take_less_memory(monkeypatch):
    """Also where there are so few that they would be unrolled otherwise."""
    monkeypatch.setattr(transformer, "_UNROLLED", 8)
    found = {}
    for remat in (False, True):
        policy, params, _ = drawn(dataclasses.replace(BASE, width=64, mlp=256, remat=remat))
        of = jax.grad(lambda params, policy=policy: jnp.sum(policy.apply(params, tokens((4, 1, 64)))[0]))
        found[remat] = jax.jit(of).lower(params).compile().memory_analysis().temp_size_in_bytes
    assert found[True] < 0.7 * found[False]
