"""The policy: a decoder-only transformer in Flax NNX, used through a pure `apply`.

It has RMSNorms, rotary positions, grouped-query attention and a gated feed-forward. The config sets the place of the
norms, tied or untied embeddings, attention biases, query/key norms, scaled rotary frequencies, sliding windows and a
mixture of experts. So the same code runs the shapes of Llama, Mistral, SmolLM3, OLMo 2, Gemma 3, Qwen2, Qwen3 and
Qwen3-MoE. Layers are stacked on a leading axis and scanned, so that compile time does not grow with depth. For
decoding they are taken apart where that is faster (`for_decoding`).

`build` splits the modules once into a graph definition and parameters; after that, only pure functions of the
parameters are used. A response attends to three segments: the keys and values of the instructions (`Instructions`,
the same for all examples), of its group's prompt (`Prefix`, computed once per example) and its own (`Cache`). One
softmax runs over all three, so sharing is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from agrl_jax.policy.attention import Attention, LayerPrefix
from agrl_jax.policy.experts import MixtureOfExperts
from agrl_jax.policy.layers import HIDDEN, KEYS, QUERIES, FeedForward, PolicyConfig, norm_weight, param, rms_norm
from agrl_jax.policy.products import PRODUCT, einsum
from agrl_jax.types import ANYWHERE, Array, Axes, Cache, Instructions, Params, Placement, Policy, Prefix

_UNROLLED = 8  # so many layers at most are unrolled: on a CPU the gradient takes a quarter less, compiling takes more


class Block(nnx.Module):
    """One layer: attention and feed-forward, each added to the residual, with a norm before it, after it, or both."""

    def __init__(self, cfg: PolicyConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        for name in ("attention_norm", "mlp_norm") if cfg.norms != "after" else ():
            setattr(self, name, norm_weight(cfg, (cfg.width,), ("embed",)))
        for name in ("attention_post_norm", "mlp_post_norm") if cfg.norms != "before" else ():
            setattr(self, name, norm_weight(cfg, (cfg.width,), ("embed",)))
        self.attention = Attention(cfg, rngs)
        self.mlp = (MixtureOfExperts if cfg.experts else FeedForward)(cfg, rngs)


class Transformer(nnx.Module):
    """Embedding, stacked blocks (a leading layer axis on every weight), final norm, head."""

    def __init__(self, cfg: PolicyConfig, rngs: nnx.Rngs):
        # An embedding that is not the head too has rows of unit scale. Adam's steps then move the row of a rare word
        # and do not rewrite it.
        scale = 0.02 if cfg.tied else 1.0
        self.embedding = param(rngs, (cfg.vocab_size, cfg.width), ("vocab", "embed"), scale, cfg.param_dtype)
        make_block = nnx.vmap(lambda key: Block(cfg, nnx.Rngs(params=key)), in_axes=0, out_axes=0)
        self.blocks = make_block(jax.random.split(rngs.params(), cfg.layers))
        self.final_norm = norm_weight(cfg, (cfg.width,), ("embed",))
        if not cfg.tied:
            shape, scale = (cfg.width, cfg.vocab_size), cfg.width**-0.5
            self.head = param(rngs, shape, ("embed", "vocab"), scale, cfg.param_dtype)


Observe = Callable[[Any, Array], Any]
# Stores the new keys and values and returns those to attend to.
Remember = Callable[[Array, Array], tuple[Array, Array]]
# (attention, queries, keys, values, prefix, instructions, remember, reach) -> values [B, G, n, H, head_dim]
Attend = Callable[..., Array]


def _run_block(
    block: Block, x: Array, index: Array | int, positions: Array, prefix: LayerPrefix | None,
    instructions: Instructions | None, remember: Remember, attend: Attend, placement: Placement,
    observe: Observe = lambda mlp, x: None,
) -> tuple[Array, Any]:
    """Runs layer `index` on x [B, G, n, D]. Also returns what `observe` makes of the feed-forward and its input."""
    cfg, reach, is_global = block.cfg, None, True

    def norm(name: str, x: Array) -> Array:
        return rms_norm(cfg, x, getattr(block, name)[...]) if hasattr(block, name) else x

    if cfg.window:
        is_global = jnp.bool_(cfg.global_every) & ((index + 1) % max(cfg.global_every, 1) == 0)
        reach = jnp.where(is_global, jnp.iinfo(jnp.int32).max, cfg.window)
    if every := cfg.unrotated_every:
        positions = jnp.where((index + 1) % every == 0, 0, positions)  # position 0 turns nothing
    q, k, v = block.attention.project(norm("attention_norm", x), positions, is_global)
    q, k, v = placement.place(q, QUERIES), placement.place(k, KEYS), placement.place(v, KEYS)
    mixed = attend(block.attention, q, k, v, prefix, instructions, remember, reach)
    x = placement.place(x + norm("attention_post_norm", block.attention.output(mixed)), HIDDEN)
    y = norm("mlp_norm", x)
    added = norm("mlp_post_norm", block.mlp(y, placement))
    return placement.place(x + added, HIDDEN), observe(block.mlp, y)


def _forward(
    cfg: PolicyConfig, merge: Callable[[Params], Transformer], params: Params, tokens: Array, offset: Array | int,
    prefix: Prefix | None, cache: Cache | None, instructions: Instructions | None, placement: Placement,
    observe: Observe = lambda mlp, x: None,
) -> tuple[Array, Cache, Any]:
    """`apply` of `build`. Also returns what `observe` made of each layer."""
    model = merge(params)
    start = 0 if prefix is None else prefix.length[:, None, None]
    if instructions is not None:
        start = start + instructions.number  # not in place: `length` may be an array of numpy
    positions = start + offset + jnp.broadcast_to(jnp.arange(tokens.shape[2]), (tokens.shape[0], 1, tokens.shape[2]))

    def attend(
        attention: Attention, q: Array, k: Array, v: Array, prefix: Any, shared: Any, remember: Any, reach: Any
    ) -> Array:
        start = None if cache is None else offset
        return attention.attend(q, *remember(k, v), start, prefix, shared, placement, reach)

    x = _embed(cfg, model, tokens, placement)
    run = partial(_run_block, positions=positions, attend=attend, placement=placement, observe=observe)
    if isinstance(params["blocks"], tuple):
        blocks = [merge({**params, "blocks": weights}).blocks for weights in params["blocks"]]
        x, cache, seen = _loop(blocks, x, offset, prefix, cache, instructions, run)
    else:
        x, cache, seen = _scan(cfg, model.blocks, x, offset, prefix, cache, instructions, run)
    return rms_norm(cfg, x, model.final_norm[...]), cache, seen


def _forward_groups(
    cfg: PolicyConfig, merge: Callable[[Params], Transformer], params: Params, prompt: Array, prompt_len: Array,
    tokens: Array, instructions: Instructions | None, placement: Placement,
) -> tuple[Array, Array]:
    """`apply_groups` of `build`. Prompts and answers are rows of one array, so each weight has one product."""
    model, (b, group, n), length = merge(params), tokens.shape, prompt.shape[1]
    rows = jnp.concatenate([prompt, tokens.reshape(b, group * n)], axis=1)[:, None]
    of_prompt = jnp.broadcast_to(jnp.arange(length), (b, length))
    of_answers = jnp.tile(prompt_len[:, None] + jnp.arange(n), (1, group))
    positions = jnp.concatenate([of_prompt, of_answers], axis=1)[:, None]
    if instructions is not None:
        positions += instructions.number

    def attend(
        attention: Attention, q: Array, k: Array, v: Array, prefix: None, shared: Any, remember: Any, reach: Any
    ) -> Array:
        return attention.attend_groups(q, k, v, prompt_len, (length, group), shared, placement, reach)

    # Each device looks up its part of D for all rows; then the devices exchange rows. So no device gathers the whole
    # table, and its gradient, which is as large, is not summed over all devices.
    looked_up = placement.place(model.embedding[...][rows], ("data_batch", None, None, "embed"))
    x = placement.place(_enter(cfg, looked_up), HIDDEN)
    run = partial(_run_block, positions=positions, attend=attend)
    x = _scan(cfg, model.blocks, x, 0, None, None, instructions, partial(run, placement=placement))[0]
    hidden = rms_norm(cfg, x[:, 0], model.final_norm[...])
    return hidden[:, :length], hidden[:, length:].reshape(b, group, n, -1)


def _enter(cfg: PolicyConfig, rows: Array) -> Array:
    """Rows of the embedding as the first layer takes them."""
    rows = rows.astype(jnp.dtype(cfg.compute_dtype))
    return rows * jnp.asarray(cfg.width**0.5, rows.dtype) if cfg.scaled_embedding else rows


def _embed(cfg: PolicyConfig, model: Transformer, tokens: Array, placement: Placement) -> Array:
    """[B, G, n, D] of tokens [B, G, n]."""
    # If the table were split along D, every device would look up all rows.
    table = placement.place(model.embedding[...], ("vocab", None))
    return placement.place(_enter(cfg, table[tokens]), HIDDEN)


def _scan(
    cfg: PolicyConfig, blocks: Block, x: Array, offset: Array | int, prefix: Prefix | None, cache: Cache | None,
    instructions: Instructions | None, run: Callable[..., tuple[Array, Any]],
) -> tuple[Array, Cache | None, Any]:
    """Runs the layers as one scan over their stacked weights. The cache is None where no layer calls `remember`."""
    graph, weights = nnx.split(blocks)

    def layer(carry: tuple[Array, Any], xs: tuple[Any, Any, Any, Array]) -> tuple[tuple[Array, Any], Any]:
        x, (cache_k, cache_v) = carry
        block_weights, prefix_kv, shared, index = xs
        fresh: list[Array] = []

        def remember(k: Array, v: Array) -> tuple[Array, Array]:
            if cache_k is None:
                fresh.extend((k, v))
                return k, v
            at = (index, 0, 0, 0, offset, 0)  # in place: the scan carries the whole cache and copies no layer of it
            full_k = jax.lax.dynamic_update_slice(cache_k, k[None], at)
            full_v = jax.lax.dynamic_update_slice(cache_v, v[None], at)
            fresh.extend((full_k, full_v))
            return full_k[index], full_v[index]

        layer_prefix = None if prefix_kv is None else LayerPrefix(*prefix_kv, prefix.length)
        x, seen = run(
            nnx.merge(graph, block_weights), x, index, prefix=layer_prefix, instructions=shared, remember=remember
        )
        return ((x, (None, None)), (tuple(fresh), seen)) if cache_k is None else ((x, tuple(fresh)), (None, seen))

    prefix_kv = None if prefix is None else (prefix.k, prefix.v)
    kept = (None, None) if cache is None else (cache.k, cache.v)
    unroll = cfg.layers if cfg.layers <= _UNROLLED and not cfg.remat else 1  # what is unrolled would not be recomputed
    body = layer
    if cfg.remat:
        body = jax.checkpoint(layer, prevent_cse=False)
    elif unroll == 1:  # keep products alone: SmolLM2's gradient on a CPU is as fast, with residuals of 2.2, not 6.0 GB
        body = jax.checkpoint(layer, prevent_cse=False, policy=jax.checkpoint_policies.save_only_these_names(PRODUCT))
    xs = (weights, prefix_kv, instructions, jnp.arange(cfg.layers))
    (x, kept), (fresh, seen) = jax.lax.scan(body, (x, kept), xs, unroll=unroll)
    kept = fresh if cache is None else kept
    return x, Cache(*kept) if kept else None, seen


def _loop(
    blocks: list[Block], x: Array, offset: Array | int, prefix: Prefix | None, cache: Cache | None,
    instructions: Instructions | None, run: Callable[..., tuple[Array, Any]],
) -> tuple[Array, Cache, Any]:
    """Runs the layers one after the other; weights, instructions, prefix and cache have an entry for each layer."""
    kept: list[tuple[Array, Array]] = []
    seen = []
    for index, block in enumerate(blocks):

        def remember(k: Array, v: Array, index: int = index) -> tuple[Array, Array]:
            if cache is not None:
                k, v = (
                    jax.lax.dynamic_update_slice(whole[index], new, (0, 0, 0, offset, 0))
                    for whole, new in ((cache.k, k), (cache.v, v))
                )
            kept.append((k, v))
            return k, v

        layer_prefix = None if prefix is None else LayerPrefix(prefix.k[index], prefix.v[index], prefix.length)
        shared = None if instructions is None else Instructions(instructions.k[index], instructions.v[index])
        x, saw = run(block, x, index, prefix=layer_prefix, instructions=shared, remember=remember)
        seen.append(saw)
    return x, Cache(*zip(*kept, strict=True)), seen


def _structure(cfg: PolicyConfig) -> tuple[nnx.State, Callable[[Params], Transformer]]:
    """The parameters as abstract variables, and the function that puts arrays into the modules."""
    graph, template = nnx.split(nnx.eval_shape(lambda: Transformer(cfg, nnx.Rngs(params=0))))

    def merge(params: Params) -> Transformer:
        if isinstance(params["blocks"], tuple):  # one entry for each layer: the first fills the module's one block
            params = {**params, "blocks": params["blocks"][0]}
        state = jax.tree.map(lambda x: x, template)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)

    return template, merge


def build(cfg: PolicyConfig, placement: Placement = ANYWHERE) -> tuple[Policy, Callable[[Array], Params], Params]:
    """The pure functions of a policy of this shape; `placement` says where activations lie.

    Returns `(policy, init, axes)`: `init(key)` draws parameters, a nested dict of arrays; `axes` is a
    dict of the same structure with the logical axis names of each (a leading "layers" where stacked).

    `policy.apply(params, tokens, offset=0, prefix=None, cache=None, instructions=None)` runs tokens [B, G, n] and
    returns their final hidden states [B, G, n, D] and their keys and values. The tokens stand at slots
    offset .. offset + n - 1 of a response; without `prefix`, of a prompt; without `instructions` too, of the
    instructions. Without a cache, the n tokens see instructions, prefix and, causally, each other, and the returned
    cache holds their n entries. With a cache, their entries are written at `offset`, and they see instructions,
    prefix and all slots up to their own. Where the layers of the parameters are apart (`for_decoding`), those of
    instructions, prefix and cache are apart too.

    `policy.apply_groups(params, prompt, prompt_len, tokens, instructions=None)` runs prompts [B, S], right-padded, of
    `prompt_len` [B] tokens and their groups' tokens [B, G, n] through each layer together: every weight is read,
    gathered and differentiated once. It returns the hidden states of both, [B, S, D] and [B, G, n, D].
    """
    template, merge = _structure(cfg)

    def init(key: Array) -> Params:
        return nnx.to_pure_dict(nnx.state(Transformer(cfg, nnx.Rngs(params=key))))

    def apply(
        params: Params, tokens: Array, *, offset: Array | int = 0, prefix: Prefix | None = None,
        cache: Cache | None = None, instructions: Instructions | None = None,
    ) -> tuple[Array, Cache]:
        return _forward(cfg, merge, params, tokens, offset, prefix, cache, instructions, placement)[:2]

    def apply_groups(
        params: Params, prompt: Array, prompt_len: Array, tokens: Array, *, instructions: Instructions | None = None
    ) -> tuple[Array, Array]:
        return _forward_groups(cfg, merge, params, prompt, prompt_len, tokens, instructions, placement)

    def unembed(params: Params, hidden: Array) -> Array:
        return _unembed(cfg, merge(params), hidden, placement)

    def init_cache(params: Params, batch: int, group: int, length: int) -> Cache:
        return _init_cache(cfg, isinstance(params["blocks"], tuple), (batch, group, length), placement)

    return Policy(apply, unembed, init_cache, apply_groups), init, _logical_axes(template)


def _logical_axes(template: nnx.State) -> Params:
    """The logical axis names of each parameter."""
    return jax.tree.map(
        lambda variable: (("layers",) if variable.ndim > len(variable.axes) else ()) + tuple(variable.axes),
        nnx.to_pure_dict(template, extract_fn=lambda variable: variable),
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )


def _unembed(cfg: PolicyConfig, model: Transformer, hidden: Array, placement: Placement) -> Array:
    """Logits [B, ..., V] in float32 from hidden states [B, ..., D]."""
    if cfg.tied:
        head, axes = _summed_in_place(model.embedding[...], ("vocab", "embed"), placement), "vd"
    else:
        head, axes = _summed_in_place(model.head[...], ("embed", "vocab"), placement), "dv"
    # One product of two matrices, as in `linear`: the gradient is 1.4 times as fast on a CPU.
    flat, head = hidden.reshape(-1, cfg.width), head.astype(hidden.dtype)
    logits = einsum(f"nd,{axes}->nv", flat, head).reshape(*hidden.shape[:-1], -1)
    return placement.place(logits, ("batch", *[None] * (logits.ndim - 2), "vocab"))


def _summed_in_place(weight: Array, axes: Axes, placement: Placement) -> Array:
    """`weight` itself. As its gradient is summed over devices, each device receives only the part that it holds."""
    same = jax.custom_vjp(lambda x: x)
    same.defvjp(lambda x: (x, None), lambda _, slope: (placement.place(slope, axes),))
    return same(weight)


def _init_cache(cfg: PolicyConfig, apart: bool, size: tuple[int, int, int], placement: Placement) -> Cache:
    """An empty cache; `size` is (B, G, T). With `apart`, each layer has arrays of its own."""
    batch, group, length = size
    shape = (batch, group, cfg.kv_heads, length, cfg.head_dim)
    if apart:
        empty = tuple(placement.place(jnp.zeros(shape, cfg.compute_dtype), KEYS) for _ in range(cfg.layers))
    else:
        empty = placement.place(jnp.zeros((cfg.layers, *shape), cfg.compute_dtype), ("layers", *KEYS))
    return Cache(k=empty, v=empty)


class ExpertLoad(NamedTuple):
    """How a mixture's router spreads tokens over the experts, each layer by itself."""

    share: Array  # [L, experts] float32 share of the tokens' choices that fell on each expert; rows add up to 1
    probability: Array  # [L, experts] float32 mean of the router's probabilities

    def metrics(self) -> dict[str, Array]:
        """Scalars: the balance loss of Switch transformers (arXiv 2101.03961; 1 where balanced, at most the number
        of experts), the busiest expert's load divided by the mean load, and the share of experts that no token chose.
        """
        experts = self.share.shape[-1]
        return {
            "experts/balance_loss": experts * jnp.mean(jnp.sum(self.share * self.probability, axis=-1)),
            "experts/max_load": experts * jnp.mean(jnp.max(self.share, axis=-1)),
            "experts/idle": jnp.mean(self.share == 0),
        }


def build_expert_load(cfg: PolicyConfig, placement: Placement = ANYWHERE) -> Callable[..., ExpertLoad]:
    """The pure function `(params, tokens [B, n], valid [B, n] bool, instructions=None) -> ExpertLoad`.

    It counts valid tokens; they run after the instructions, if there are any. `placement` is that of `build`.
    Raises ValueError where the policy has no experts.
    """
    if not cfg.experts:
        raise ValueError("policy.experts=0: there is no router whose load could be told")
    merge = _structure(cfg)[1]

    def expert_load(
        params: Params, tokens: Array, valid: Array, instructions: Instructions | None = None
    ) -> ExpertLoad:
        weight = valid.astype(jnp.float32) / jnp.maximum(valid.sum(), 1)

        def observe(mlp: MixtureOfExperts, x: Array) -> ExpertLoad:
            probability, _, chosen = mlp.route(x[:, 0], mlp.router[...])
            counts = jax.nn.one_hot(chosen, cfg.experts).sum(axis=2) / cfg.experts_per_token
            return ExpertLoad(*(jnp.einsum("bne,bn->e", y, weight) for y in (counts, probability)))

        return _forward(cfg, merge, params, tokens[:, None], 0, None, None, instructions, placement, observe)[2]

    return expert_load


def cast_weights(cfg: PolicyConfig, params: Params) -> Params:
    """`params` in the dtypes in which the policy uses them; its results stay the same.

    Norms and routers compute in float32, so their weights stay as they are.
    """

    def cast(path: tuple[Any, ...], leaf: Array) -> Array:
        name = path[-1].key
        return leaf if name == "router" or name.endswith("norm") else leaf.astype(cfg.compute_dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def count_parameters(params: Params) -> int:
    """The number of scalars in a pytree of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
