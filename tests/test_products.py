"""Products and their gradients are those of JAX, but for rounding, in each dtype."""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agrl_jax.policy.layers import PolicyConfig
from agrl_jax.policy.products import einsum, matmul, matmul_transposed
from agrl_jax.policy.scoring import run_groups
from agrl_jax.policy.transformer import build

dtypes = pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-2)])


@dtypes
@pytest.mark.parametrize("rows", [6, 7])  # an even number of rows is split in two for the gradient
@pytest.mark.parametrize("width", [5, 9])  # the gradient transposes the narrower operand
def test_a_product_and_its_gradient_are_those_of_jax_but_for_rounding(width, rows, dtype, tolerance, close):
    rng = np.random.default_rng(0)
    x, y, into = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((rows, 8), (8, width), (rows, width)))

    def run(product):
        return jax.value_and_grad(lambda x, y: jnp.sum((product(x, y) * into).astype(jnp.float32)), argnums=(0, 1))

    found = jax.jit(run(matmul))(x, y)
    close(found, run(jnp.matmul)(*(a.astype(jnp.float32) for a in (x, y))), tolerance)
    assert {leaf.dtype for leaf in found[1]} == {jnp.dtype(dtype)}
    turned = matmul_transposed(x, y.T)
    close(turned, jnp.matmul(x.astype(jnp.float32), y.astype(jnp.float32)), tolerance)
    assert turned.dtype == jnp.dtype(dtype)


@dtypes
@pytest.mark.parametrize(
    "spec", ["bik,bjk->bij", "bgik,bjk->bgij", "bgij,bjk->bgik", "nd,dv->nv", "nd,vd->nv"]
    # scores (twice), values, logits (twice)
)
def test_gradient_of_einsum_is_that_of_jax_but_for_rounding(spec, dtype, tolerance, close):
    rng = np.random.default_rng(0)
    sizes = {"b": 2, "g": 3, "i": 4, "j": 5, "k": 6, "n": 7, "d": 8, "v": 9}
    shapes = [[sizes[axis] for axis in axes] for axes in re.split(",|->", spec)]
    x, y, into = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)

    def gradient(product):
        return jax.grad(lambda x, y: jnp.sum(product(spec, x, y) * into), argnums=(0, 1))(x, y)

    found, exact = gradient(einsum), gradient(partial(jnp.einsum, preferred_element_type=jnp.float32))
    assert {leaf.dtype for leaf in found} == {jnp.dtype(dtype)}
    close(found, exact, tolerance)


@pytest.mark.usefixtures("scanned")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_of_stacked_layers_makes_no_product_anew_and_stacks_each_in_place(dtype):
    """With rows x 28 outputs there are two products forward, gate and up, and the gradient of what `down` reads.

    To stack bfloat16, XLA on a CPU converts the whole stack to float32 at each layer.
    """
    cfg = PolicyConfig(
        vocab_size=23, width=20, layers=3, heads=4, kv_heads=2, head_dim=6, mlp=28, compute_dtype=dtype
    )
    policy, init, _ = build(cfg)
    prompt, response = np.ones((2, 4), np.int32), np.ones((2, 3, 5), np.int32)

    def loss(params):
        return jnp.sum(run_groups(policy, params, prompt, np.array([4, 2]), response)[1].astype(jnp.float32))

    text = jax.jit(jax.grad(loss)).lower(jax.eval_shape(init, jax.random.key(0))).compile().as_text()
    rows = prompt.size + response[..., 1:].size  # the last token predicts none
    assert len(re.findall(rf"\[{rows},28\]\S* dot\(", text)) == 3
    stacks = re.findall(rf"(\w+)\[3,{rows},28\]\S* dynamic-update-slice\(", text)
    assert stacks == ["f32" if dtype == "float32" else "u16"] * 2
