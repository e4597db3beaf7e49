"""Prompts as a conversation: the rule book's instructions and one question, through the model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from agrl_jax.policy.tokenizer import Tokenizer, TokenizerError
from agrl_jax.rulebook import wording
from agrl_jax.rulebook.book import RuleBook

Message = dict[str, str]

_ANSWER = "{answer}"  # stands for what an assistant says


def pieces(book: RuleBook, tokenizer: Tokenizer) -> tuple[str, str, str]:
    """The fixed text before the query, between query and item, and after the item.

    The first and the last hold special tokens by their spelling. The instructions are the system's turn, or stand
    first in the user's where the template has no place for a system.

    Raises:
      TokenizerError: the model has no chat template, or one that cannot be rendered.
    """
    system, user = wording.turns(book)
    alone = [{"role": "user", "content": f"{system}\n\n{user}"}]
    try:
        text = render(tokenizer, [{"role": "system", "content": system}, {"role": "user", "content": user}])
        text = text if system in text else render(tokenizer, alone)
    except TokenizerError:
        text = render(tokenizer, alone)
    before, query, rest = text.rpartition("{query}")  # the question is the last turn, whatever the instructions hold
    between, item, after = rest.partition("{item}")
    if not query or not item:
        raise TokenizerError("the chat template leaves out what the user says; set data.style=full")
    return before, between, after


def end_of_turn(tokenizer: Tokenizer) -> int:
    """The token that ends what an assistant says: the first special one that the template puts after it."""
    said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    after = render(tokenizer, said, reply=False).rpartition(_ANSWER)[2]
    texts = tokenizer.token_bytes()
    special = (token for token in tokenizer.encode(after, parse_special=True) if texts[token] is None)
    return next(special, tokenizer.end_token)


def render(tokenizer: Tokenizer, messages: Sequence[Message], reply: bool = True) -> str:
    """The messages as the chat template spells them; with `reply`, up to where the assistant speaks.

    As `transformers` does it, in a sandbox. Models that think aloud before they answer are told not to.
    """
    if tokenizer.chat_template is None:
        raise TokenizerError("the model has no chat template; set data.style=full")
    known = {} if tokenizer.bos_token is None else {"bos_token": tokenizer.decode([tokenizer.bos_token], special=True)}
    known["eos_token"] = tokenizer.decode([tokenizer.end_token], special=True)
    try:
        return _environment().from_string(tokenizer.chat_template).render(
            messages=messages, add_generation_prompt=reply, enable_thinking=False, **known
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise TokenizerError(f"the chat template cannot be rendered: {error}; set data.style=full") from error


def _environment() -> ImmutableSandboxedEnvironment:
    def refuse(message: Any) -> NoReturn:
        raise jinja2.TemplateError(str(message))

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = refuse
    return environment
