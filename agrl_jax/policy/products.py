"""Products of matrices in the dtype of their operands, added up in float32, and their gradients."""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from agrl_jax.types import Array

PRODUCT = "product"  # the name under which `jax.checkpoint` can save what `matmul` returns


def matmul(x: Array, y: Array) -> Array:
    """x [n, k] times y [k, m], rounded to their dtype: [n, m], named PRODUCT.

    With AVX-512 instructions for bfloat16, as AMD's Zen 4 and Intel's Cooper Lake have them, a CPU multiplies bfloat16
    twice as fast as float32. XLA uses them only for products that it may return in float32, that do not contract the
    first axis of the left operand, and that have no operand that is transposed apart. This product and its gradients
    have that form.
    """
    return checkpoint_name(x @ y, PRODUCT) if x.dtype == jnp.float32 else _matmul(x, y)


def matmul_transposed(x: Array, y: Array) -> Array:
    """x [n, k] times the transpose of y [m, k], in their dtype: [n, m]. For decoding: its gradient is not fast."""
    return _einsum("nk,mk->nm", x, y)


def _named_product(x: Array, y: Array) -> Array:
    product = _einsum("nk,km->nm", x, y)
    # A scan stacks what its layers save. To write one layer's bfloat16 into the stack, XLA on a CPU converts all of the
    # stack to float32 and back. It writes integers in place.
    bits = checkpoint_name(jax.lax.bitcast_convert_type(product, jnp.uint16), PRODUCT)
    return jax.lax.bitcast_convert_type(bits, product.dtype)


def _matmul_backward(operands: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, y = operands
    return _einsum("nm,km->nk", cotangent, y), _transposed(x, cotangent)


_matmul = jax.custom_vjp(_named_product)
_matmul.defvjp(lambda x, y: (_named_product(x, y), (x, y)), _matmul_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def einsum(spec: str, x: Array, y: Array) -> Array:
    """The einsum of two arrays of one dtype, added up and returned in float32.

    The gradient relies on each axis being in two or three parts of `spec`. It first rounds the cotangent to the dtype
    of the arrays. JAX would leave the cotangent in float32, and the products of the gradient would be float32 too.
    With the layout of scores in `attention._attend`, that took 22% of the gradient's time for 1B parameters in bfloat16
    on an H100.
    """
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


def _einsum_forward(spec: str, x: Array, y: Array) -> tuple[Array, tuple[Array, Array]]:
    return einsum(spec, x, y), (x, y)


def _einsum_backward(spec: str, operands: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, y = operands
    cotangent = cotangent.astype(x.dtype)
    left, right, out = re.split(",|->", spec)
    grad_x = _einsum(f"{out},{right}->{left}", cotangent, y)
    # With its last two axes swapped, the gradient of keys is a product with the queries on the left. Otherwise the left
    # operand is the cotangent of the scores, which is far larger, and XLA on a CPU first copies it into another order.
    # The swap saves 7% of the gradient's time of SmolLM2, with prompts of 600 tokens and 16 answers to each.
    swapped = f"{right[:-2]}{right[-1]}{right[-2]}"
    grad_y = _einsum(f"{left},{out}->{swapped}", x, cotangent).swapaxes(-1, -2)
    return grad_x, grad_y


einsum.defvjp(_einsum_forward, _einsum_backward)


def _einsum(spec: str, x: Array, y: Array) -> Array:
    """The einsum of two arrays in their dtype. GPUs and TPUs add it up in float32 without being asked."""
    if x.dtype == jnp.float32:
        return jnp.einsum(spec, x, y)

    def on_cpu(x: Array, y: Array) -> Array:
        return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32).astype(x.dtype)

    return jax.lax.platform_dependent(x, y, cpu=on_cpu, default=partial(jnp.einsum, spec))


def _transposed(x: Array, y: Array) -> Array:
    """x [n, k], transposed, times y [n, m]: [k, m]."""

    def on_cpu(x: Array, y: Array) -> Array:
        if len(x) % 2:
            return jnp.einsum("nk,nm->km", x, y)
        # XLA computes this product in float32, and the same sum over two axes in bfloat16. It transposes the left
        # operand together with the arithmetic that makes it, which is slow; so the left one is the narrower.
        x, y = x.reshape(2, -1, x.shape[1]), y.reshape(2, -1, y.shape[1])
        return _einsum("bnk,bnm->km", x, y) if x.shape[2] < y.shape[2] else _einsum("bnm,bnk->mk", y, x).T

    return jax.lax.platform_dependent(x, y, cpu=on_cpu, default=partial(jnp.einsum, "nk,nm->km"))
