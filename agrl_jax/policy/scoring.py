"""Scores tokens under a policy, for supervised training, DPO, RL and judging."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from agrl_jax.types import Array, Cache, Instructed, Instructions, Params, Policy, Prefix

NEVER = -1e30  # logit of a token that is not allowed; finite, so that 0 times it is 0


def token_logprobs(
    unembed: Callable[[Array], Array], hidden: Array, tokens: Array, temperature: float, chunk: int,
    choices: Callable[..., Array] | None = None, of: tuple[Array, ...] = (),
) -> tuple[Array, Array]:
    """Log-probability and entropy, both [B, G, T] float32, of `tokens` under hidden states [B, G, T, D].

    Works through `chunk` positions at a time and recomputes logits in the backward pass. So it never holds more than
    [chunk, V] logits ([B, V], if B is more than `chunk`). A chunk has equally many positions of each example, so that
    each data shard works on its own. With a `chunk` of 0 all logits are computed at once and kept for the backward
    pass: if they fit, this saves a quarter of the time of SmolLM2's head gradient on a CPU.

    With `choices`, log-probabilities and entropies are over the allowed tokens alone. `choices(*of)` gives these,
    [..., V] bool, for a chunk of the small arrays `of` [B, G, T]; a mask of all positions is never held. A token that
    is the only choice has a log-probability and an entropy of 0, and no gradient.
    """
    flat_hidden = hidden.reshape(tokens.shape[0], -1, hidden.shape[-1])  # [B, positions, D]
    flat_tokens = tokens.reshape(tokens.shape[0], -1)
    number = flat_tokens.shape[1]
    size = min(max(chunk // tokens.shape[0], 1), number) if chunk else number
    pad = -number % size

    def pieces(x: Array) -> Array:
        padded = jnp.pad(x, ((0, 0), (0, pad), *((0, 0),) * (x.ndim - 2)))
        return padded.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)

    def one_chunk(hidden: Array, tokens: Array, *of: Array) -> tuple[Array, Array]:
        logits = unembed(hidden) / temperature
        if choices is not None:  # a sum, unlike a selection, keeps no mask for the backward pass
            logits += jnp.where(choices(*of), 0.0, NEVER)
        return _logp_and_entropy(logits, tokens)

    run = jax.checkpoint(one_chunk) if chunk else one_chunk
    flat_of = (array.reshape(tokens.shape[0], -1) for array in of)
    xs = tuple(map(pieces, (flat_hidden, flat_tokens, *flat_of)))
    _, (logp, entropy) = jax.lax.scan(lambda _, xs: (None, run(*xs)), None, xs)
    return tuple(x.swapaxes(0, 1).reshape(len(x[0]), -1)[:, :number].reshape(tokens.shape) for x in (logp, entropy))


@jax.custom_vjp
def _logp_and_entropy(logits: Array, tokens: Array) -> tuple[Array, Array]:
    """Log-probability of `tokens` [...] and entropy [...] under logits [..., V].

    The gradient is written by hand as one pass over the logits. JAX's would scatter into zeros of the logits' size.
    """
    return _logp_and_entropy_forward(logits, tokens)[0]


def _logp_and_entropy_forward(logits: Array, tokens: Array) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    peak = jnp.max(logits, axis=-1)
    share = jnp.exp(logits - peak[..., None])
    # One reduction gives both sums, and the barrier keeps both where one goes unused. XLA on a CPU would hand a single
    # sum of exponentials to a library (YNNPACK), which takes 2 to 10 times as long.
    sums = jax.lax.reduce((share, share * logits), (0.0, 0.0), _add_pairs, (logits.ndim - 1,))
    total, mean = jax.lax.optimization_barrier(sums)
    mean, log_total = mean / total, peak + jnp.log(total)
    logit = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return (logit - log_total, log_total - mean), (logits, tokens, log_total, mean)


def _add_pairs(x: tuple[Array, Array], y: tuple[Array, Array]) -> tuple[Array, Array]:
    return x[0] + y[0], x[1] + y[1]


def _logp_and_entropy_backward(kept: tuple[Array, ...], slopes: tuple[Array, Array]) -> tuple[Array, None]:
    logits, tokens, log_total, mean = kept
    of_logp, of_entropy = (slope[..., None] for slope in slopes)
    probability = jnp.exp(logits - log_total[..., None])
    taken = jnp.where(jnp.arange(logits.shape[-1]) == tokens[..., None], of_logp, 0.0)
    return taken - probability * (of_logp + of_entropy * (logits - mean[..., None])), None


_logp_and_entropy.defvjp(_logp_and_entropy_forward, _logp_and_entropy_backward)


def run_instructions(policy: Policy, params: Params, tokens: Array) -> Instructions:
    """Runs the tokens [I] that all prompts begin with, and returns their keys and values."""
    _, cache = policy.apply(params, tokens[None, None])
    return Instructions(*jax.tree.map(lambda x: jnp.squeeze(x, (-5, -4)), (cache.k, cache.v)))


def instructed(policy: Policy, tokens: Array | None) -> tuple[Policy, Callable[[Params], Params]]:
    """A policy that goes on from instructions, and the function that makes its parameters from those of `policy`.

    That function runs the instructions `tokens` [I]. Call it once for each value of the parameters. Its gradient is
    exact: the cotangents of all uses of the instructions' keys and values are summed, and go back through the
    instructions once. Without tokens, both policies and their parameters are the same.
    """
    if tokens is None or not len(tokens):
        return policy, lambda params: params

    def instruct(params: Params) -> Instructed:
        return Instructed(params, run_instructions(policy, params, jnp.asarray(tokens)))

    def apply(params: Instructed, tokens: Array, **more: Any) -> tuple[Array, Cache]:
        return policy.apply(params.params, tokens, instructions=params.instructions, **more)

    def unembed(params: Instructed, hidden: Array) -> Array:
        return policy.unembed(params.params, hidden)

    def init_cache(params: Instructed, batch: int, group: int, length: int) -> Cache:
        return policy.init_cache(params.params, batch, group, length)

    def apply_groups(params: Instructed, *groups: Array) -> tuple[Array, Array]:
        return policy.apply_groups(params.params, *groups, instructions=params.instructions)

    return Policy(apply, unembed, init_cache, apply_groups), instruct


def shared_tokens(params: Params) -> int:
    """How many tokens of instructions these parameters hold; see `instructed`."""
    return params.instructions.number if isinstance(params, Instructed) else 0


def run_prompt(policy: Policy, params: Params, prompt: Array, prompt_len: Array) -> tuple[Prefix, Array]:
    """Runs right-padded prompts [B, S] of `prompt_len` [B] tokens. Returns the prefix for their responses, and the
    hidden states [B, S, D]."""
    hidden, cache = policy.apply(params, prompt[:, None])
    k, v = jax.tree.map(lambda x: jnp.squeeze(x, -4), (cache.k, cache.v))
    return Prefix(k=k, v=v, length=prompt_len, last_hidden=_last_hidden(hidden[:, 0], prompt_len)), hidden[:, 0]


def prefill(policy: Policy, params: Params, prompt: Array, prompt_len: Array) -> Prefix:
    """Runs each prompt once, for all the responses of its group; see `run_prompt`."""
    return run_prompt(policy, params, prompt, prompt_len)[0]


def extend_prefix(policy: Policy, params: Params, prefix: Prefix, tokens: Array, number: Array) -> Prefix:
    """The prefix with the first `number` [B] of the tokens [B, n] appended, in one pass through the network."""
    return cut(*run_on(policy, params, prefix, tokens), number)


def run_on(policy: Policy, params: Params, prefix: Prefix, tokens: Array) -> tuple[Prefix, Array]:
    """Runs tokens [B, n] after a prefix, for `cut`.

    Returns the prefix with the tokens' keys and values behind its own, but its `length` unchanged; and the hidden
    states [B, n + 1, D] after 0 to n of the tokens.
    """
    hidden, cache = policy.apply(params, tokens[:, None], prefix=prefix)
    size, more = jax.tree.leaves(prefix.k)[0].shape[-2], tokens.shape[1]
    slot = jnp.arange(size + more)
    after = slot - prefix.length[:, None]  # [B, S + n] place among the tokens
    source = jnp.where(after < 0, slot, size + jnp.clip(after, 0, more - 1))

    def joined(prompt: Array, own: Array) -> Array:
        both = jnp.concatenate([prompt, jnp.squeeze(own, -4)], axis=-2)
        index = source.reshape(*(1,) * (both.ndim - 4), len(source), 1, -1, 1)
        return jnp.take_along_axis(both, index, axis=-2)

    k, v = (jax.tree.map(joined, *pair) for pair in ((prefix.k, cache.k), (prefix.v, cache.v)))
    return prefix.replace(k=k, v=v), jnp.concatenate([prefix.last_hidden[:, None], hidden[:, 0]], axis=1)


def cut(prefix: Prefix, hidden: Array, size: Array) -> Prefix:
    """The prefix that ends after the first `size` [B] of the tokens, from the results of `run_on`."""
    last = jnp.take_along_axis(hidden, size[:, None, None], axis=1)[:, 0]
    return prefix.replace(length=prefix.length + size, last_hidden=last)


def predicting_hidden(policy: Policy, params: Params, prefix: Prefix, tokens: Array) -> Array:
    """Hidden states [B, G, T, D] that predict each of `tokens` [B, G, T]: teacher forcing."""
    hidden, _ = policy.apply(params, tokens[:, :, :-1], prefix=prefix)
    return jnp.concatenate([first_hidden(prefix, tokens.shape[1])[:, :, None], hidden], axis=2)


def run_groups(
    policy: Policy, params: Params, prompt: Array, prompt_len: Array, tokens: Array
) -> tuple[Array, Array]:
    """The hidden states [B, S, D] of the prompts, and those [B, G, T, D] that predict each of `tokens` [B, G, T].

    Equal to `run_prompt` and then `predicting_hidden`, but in one pass over the layers.
    """
    of_prompt, hidden = policy.apply_groups(params, prompt, prompt_len, tokens[:, :, :-1])
    first = _of_group(_last_hidden(of_prompt, prompt_len), tokens.shape[1])
    return of_prompt, jnp.concatenate([first[:, :, None], hidden], axis=2)


def first_hidden(prefix: Prefix, group_size: int) -> Array:
    """[B, G, D]: the hidden state after the prompt, the same for every sample of its group."""
    return _of_group(prefix.last_hidden, group_size)


def _last_hidden(hidden: Array, prompt_len: Array) -> Array:
    """[B, D]: the last of the hidden states [B, S, D] of each prompt."""
    return jnp.take_along_axis(hidden, prompt_len[:, None, None] - 1, axis=1)[:, 0]


def _of_group(hidden: Array, group_size: int) -> Array:
    """[B, D] repeated over a group: [B, G, D]."""
    return jnp.broadcast_to(hidden[:, None], (len(hidden), group_size, hidden.shape[-1]))


# ------------------------------------------------- texts that compete, such as the values of a part of the response


def score_parts(
    policy: Policy, params: Params, prefix: Prefix, tokens: np.ndarray, length: np.ndarray,
    choose: Callable[[int, Array], Array], before: tuple[Array, Array] | None = None,
) -> list[tuple[Array, Array]]:
    """Scores P parts of a response without a decoding loop: all texts of a part at once, after the texts chosen before.

    Args:
      policy: gives the scores, with `params`.
      params: its parameters.
      prefix: the prompts.
      tokens: [P, n, W], the texts of each part; no text of a part is the start of another.
      length: [P, n] tokens of each text that count; 0 past the texts of a part.
      choose: (index of the part, log-probabilities [B, n of the part]) -> the text [B] to go on with.
      before: tokens [B, P, W] that stand before each part of each row, not scored, and how many of them count [B, P].

    Returns:
      For each part the log-probabilities of `text_logprobs`, and the choice.
    """
    scored = []
    for part in range(len(tokens)):
        texts, sizes = tokens[part, length[part] > 0], length[part, length[part] > 0]
        if before is not None:
            prefix = extend_prefix(policy, params, prefix, before[0][:, part], before[1][:, part])
        logp, prefix = text_logprobs(policy, params, prefix, texts, sizes)
        chosen = choose(part, logp)
        scored.append((logp, chosen))
        shared = shared_start(texts, sizes)
        if part + 1 < len(tokens):
            own = jnp.asarray(texts[:, shared : sizes.max()])[chosen]
            prefix = extend_prefix(policy, params, prefix, own, jnp.asarray(sizes - shared)[chosen])
    return scored


def text_logprobs(
    policy: Policy, params: Params, prefix: Prefix, tokens: np.ndarray, length: np.ndarray
) -> tuple[Array, Prefix]:
    """Log-probabilities [B, n] of n texts after a prefix, given the tokens that all texts begin with.

    Also returns the prefix that ends after those common tokens. Texts are tokens [n, W], of which `length` [n] count;
    no text is the start of another.
    """
    shared, b = shared_start(tokens, length), prefix.length.shape[0]
    if shared:
        together = jnp.broadcast_to(tokens[0, :shared], (b, shared))
        prefix = extend_prefix(policy, params, prefix, together, jnp.full(b, shared))
    own, size = jnp.asarray(tokens[:, shared : length.max()]), jnp.asarray(length - shared)
    # One row of logits scores the first token of each text.
    total = jax.nn.log_softmax(policy.unembed(params, prefix.last_hidden))[:, own[:, 0]]
    if own.shape[1] > 1:
        texts = jnp.broadcast_to(own, (b, *own.shape))
        hidden, _ = policy.apply(params, texts[:, :, :-1], prefix=prefix)
        logp, _ = token_logprobs(partial(policy.unembed, params), hidden, texts[:, :, 1:], 1.0, 0)
        total += jnp.sum(jnp.where(jnp.arange(1, own.shape[1]) < size[:, None], logp, 0.0), axis=-1)
    return total, prefix


def shared_start(tokens: np.ndarray, length: np.ndarray) -> int:
    """The number of tokens that all texts begin with."""
    same = (tokens == tokens[0]).all(axis=0) & (np.arange(tokens.shape[1]) < length.min())
    return int(np.argmin(np.append(same, False)))
