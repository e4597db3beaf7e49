"""Prompts as a conversation: the rule book's instructions and one question, through the model's own chat template."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from agrl_jax.policy.tokenizer import Tokenizer, TokenizerError
from agrl_jax.rulebook import wording
from agrl_jax.rulebook.book import RuleBook

Message = dict[str, str]

_ANSWER = "{answer}"  # stands for what an assistant says

# The mark of a thought that the template opens at the end of a prompt, for the model to go on with.
_OPEN_THOUGHT = re.compile(r"([<\[])([\w:]*(?:think|thought|reason)\w*)([>\]])\s*$", re.IGNORECASE)


def pieces(book: RuleBook, tokenizer: Tokenizer) -> tuple[str, str, str]:
    """The fixed text before the query, between query and item, and after the item.

    The first and the last hold special tokens by their spelling. The instructions are the system's turn, or begin the
    user's turn where the template has no system. Unless the tokenizer is `thinking`, a thought that the template opens
    is closed, so that the answer follows.

    Raises:
      TokenizerError: the model has no chat template, or one that cannot be rendered.
    """
    system, user = wording.turns(book)
    alone = [{"role": "user", "content": f"{system}\n\n{user}"}]
    try:
        text = render(tokenizer, [{"role": "system", "content": system}, {"role": "user", "content": user}])
        text = text if system.strip() in text else render(tokenizer, alone)
    except TokenizerError:
        text = render(tokenizer, alone)
    before, query, rest = text.rpartition("{query}")  # the question is the last turn, whatever the instructions hold
    between, item, after = rest.partition("{item}")
    if not query or not item:
        raise TokenizerError("the chat template leaves out what the user says; set data.style=full")
    return before, between, after if tokenizer.thinking else _without_open_thought(after)


def _without_open_thought(reply: str) -> str:
    """The beginning of a reply; a thought that it opens is closed at once, as by Qwen3's template."""
    opened = _OPEN_THOUGHT.search(reply)
    return f"{reply.rstrip()}\n\n{opened[1]}/{opened[2]}{opened[3]}\n\n" if opened else reply


def thought(book: RuleBook, tokenizer: Tokenizer) -> tuple[str, str]:
    """The marks before and after a thought that begins an answer; the first is empty where the prompt ends with it.

    They are the marks that the chat template opens, or else <think>.

    Raises:
      TokenizerError: as `pieces`; or thinking does not change the prompts; or a mark is not a token.
    """
    after, quiet = (pieces(book, tokenizer.with_thinking(limit))[2] for limit in (1, 0))
    if after == quiet:
        raise TokenizerError("the chat template knows no thinking; set policy.thinking=off")
    opened = _OPEN_THOUGHT.search(after)
    left, name, right = opened.groups() if opened else ("<", "think", ">")
    begin, end = f"{left}{name}{right}", f"{left}/{name}{right}"
    for mark in (begin, end):
        ids = tokenizer.encode(mark, parse_special=True)
        if len(ids) != 1 or ids[0] not in tokenizer.marks:
            raise TokenizerError(f"{mark} is no token of the model; set policy.thinking=off")
    return "" if opened else f"{begin}\n", f"{end}\n\n"


def end_of_turn(tokenizer: Tokenizer) -> int:
    """The token that ends what an assistant says: the first special one that the template puts after it."""
    said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    after = render(tokenizer, said, reply=False).rpartition(_ANSWER)[2]
    texts = tokenizer.token_bytes()
    special = (token for token in tokenizer.encode(after, parse_special=True) if texts[token] is None)
    return next(special, tokenizer.end_token)


def render(tokenizer: Tokenizer, messages: Sequence[Message], reply: bool = True) -> str:
    """The messages as `transformers` renders them by the chat template; with `reply`, up to where the assistant speaks.

    A template that knows thinking asks for a thought where the tokenizer is `thinking`, and for none elsewhere.

    Raises:
      TokenizerError: the model has no chat template, or one that cannot be rendered.
    """
    if tokenizer.chat_template is None:
        raise TokenizerError("the model has no chat template; set data.style=full")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # no warning that PyTorch is missing
    from transformers.utils import chat_template_utils  # takes a second, and only templates need it

    try:
        (text,), _ = chat_template_utils.render_jinja_template(
            [list(messages)], chat_template=tokenizer.chat_template, add_generation_prompt=reply,
            enable_thinking=tokenizer.thinking > 0, **tokenizer.special_tokens,
        )  # fmt: skip
    except Exception as error:  # a template is foreign code, and can raise anything
        raise TokenizerError(f"the chat template cannot be rendered: {error}; set data.style=full") from error
    return text
