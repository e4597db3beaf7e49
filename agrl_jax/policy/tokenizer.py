"""Text to tokens and back, by byte-level BPE: trained here, or read from a Hugging Face folder or a GGUF file.

Tokens stand for bytes, so that the rule book's phrases can be read from them exactly (`token_bytes`). Text is
only ever text: a title that contains "<|end|>" does not become the end token.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from typing import Any

import tokenizers
from etils import epath
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from agrl_jax.runtime.files import write_json, write_text

END = "<|end|>"
_CONFIG = "tokenizer_config.json"
_FILE = "tokenizer.json"

# How text is cut into words before merging, for the tokenizer trained here. A space or line break goes with the
# word that follows and a colon with the word before, so that responses such as "Category: same" are short;
# digits stand alone, so that prices are spelt alike.
_WORDS = r"[ \n]?\p{L}[\p{L}\p{M}]*(?:'\p{L}+)?:?|[ \n]?\p{N}|[ \n]?[^\s\p{L}\p{N}]+|\s"

# The same for the models that GGUF files hold, by `tokenizer.ggml.pre`: patterns that cut in turn.
_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS_AND = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GGUF_WORDS = {
    "gpt-2": (_GPT2_WORDS,),
    "smollm": (r"\p{N}", _GPT2_WORDS),
    "qwen2": (rf"{_CONTRACTIONS}|{_LETTERS_AND}|\p{{N}}|{_REST}",),
    "llama-bpe": (rf"{_CONTRACTIONS}|{_LETTERS_AND}|\p{{N}}{{1,3}}|{_REST}",),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2_WORDS, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
_GGUF_NORMAL = 1  # token types of GGUF: the others are unknown, control, user-defined, unused and byte


class TokenizerError(ValueError):
    """A tokenizer that cannot be trained or read; the message names file and key."""


class Tokenizer:
    """A byte-level BPE vocabulary.

    Attributes:
      vocab_size: number of tokens; ids are 0 to vocab_size - 1.
      end_token: id of the token that ends a response.
      bos_token: id of the token that every prompt starts with; None where the model has none.
      chat_template: the model's own Jinja template for conversations, or None.
    """

    def __init__(
        self, core: tokenizers.Tokenizer, end_token: int, bos_token: int | None = None, chat_template: str | None = None
    ) -> None:
        self.vocab_size = core.get_vocab_size(with_added_tokens=True)
        for name, token in (("end", end_token), ("bos", bos_token)):
            if token is not None and not 0 <= token < self.vocab_size:
                raise TokenizerError(f"the {name} token {token} is outside the vocabulary of {self.vocab_size} tokens")
        self.end_token = end_token
        self.bos_token = bos_token
        self.chat_template = chat_template
        self._parsing = _copy(core, parse_special=True)
        self._text = _copy(core, parse_special=False)

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """The tokens of a text; nothing is added.

        `parse_special` turns the spelling of a special token into that token, which a rendered chat template
        needs. Never set it for text that others wrote.
        """
        core = self._parsing if parse_special else self._text
        return core.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        return [encoding.ids for encoding in self._text.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """The text of the tokens' bytes, with no clean-up; bytes that are not UTF-8 become U+FFFD.

        Special tokens are left out, or with `special` spelt out. Ids past the vocabulary, which models with padded
        embeddings can sample, have no text.
        """
        data = bytearray()
        for token in ids:
            if token >= self.vocab_size:
                continue
            piece = self._bytes[token]
            if piece is not None:
                data += piece
            elif special:
                data += self._text.id_to_token(token).encode()
        return data.decode("utf-8", errors="replace")

    def token_bytes(self) -> list[bytes | None]:
        """The bytes that each token stands for; None for special tokens, which stand for no text."""
        return list(self._bytes)

    @functools.cached_property
    def _bytes(self) -> tuple[bytes | None, ...]:
        special = self._text.get_added_tokens_decoder()
        pieces: list[bytes | None] = []
        for token in range(self.vocab_size):
            spelling = self._text.id_to_token(token)
            if spelling is None or token in special:
                pieces.append(None)
                continue
            try:
                pieces.append(bytes(_BYTE_OF[character] for character in spelling))
            except KeyError as error:
                raise TokenizerError(f"token {token}, {spelling!r}, is not spelt in the byte-level alphabet") from error
        return tuple(pieces)

    def ending_with(self, end_token: int) -> Tokenizer:
        """The same vocabulary, whose responses end with another token."""
        if end_token == self.end_token:
            return self
        return Tokenizer(self._parsing, end_token, self.bos_token, self.chat_template)

    def save(self, path: epath.PathLike) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, in Hugging Face's layout, into a folder."""
        folder = _folder(path)
        folder.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self._text.id_to_token(self.end_token),
            "add_bos_token": self.bos_token is not None,
        }
        if self.bos_token is not None:
            config["bos_token"] = self._text.id_to_token(self.bos_token)
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        write_json(folder / _CONFIG, config)
        write_text(folder / _FILE, self._parsing.to_str(pretty=True))  # last: where it is, all is


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learns a vocabulary of at most `vocab_size` tokens: the end token, the 256 bytes, then merges.

    The same texts give the same vocabulary. There are fewer tokens where the texts have too few words.
    """
    alphabet = sorted(_BYTE_OF)
    if vocab_size < len(alphabet) + 1:
        raise TokenizerError(f"vocab_size={vocab_size} is too small: the bytes and {END} alone are {len(alphabet) + 1}")
    core = _byte_level(models.BPE(), (_WORDS,))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    return Tokenizer(core, core.token_to_id(END))


def load(path: epath.PathLike) -> Tokenizer:
    """Reads what `save` wrote, or a Hugging Face folder with a byte-level BPE `tokenizer.json`.

    Raises:
      TokenizerError: a file is missing or unreadable, or no end token is named.
    """
    folder = _folder(path)
    try:
        core = tokenizers.Tokenizer.from_str((folder / _FILE).read_text())
    except OSError as error:
        raise TokenizerError(f"{folder / _FILE}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # the Rust side raises plain Exception
        raise TokenizerError(f"{folder / _FILE}: not a tokenizer: {error}") from error
    config = _read_config(folder)
    end = _special(core, config.get("eos_token", END))
    if end is None:
        raise TokenizerError(f"{folder / _CONFIG}: eos_token should name a token of the vocabulary")
    bos = _special(core, config.get("bos_token"))
    adds_bos = config.get("add_bos_token") or core.encode("").ids[:1] == [bos]  # by flag or by template
    tokenizer = Tokenizer(core, end, bos if adds_bos else None, _chat_template(folder, config))
    try:
        tokenizer.token_bytes()
    except TokenizerError as error:
        raise TokenizerError(f"{folder / _FILE}: {error}; only byte-level vocabularies can be used") from error
    return tokenizer


def from_gguf(path: epath.PathLike) -> Tokenizer:
    """Rebuilds the tokenizer inside a GGUF file, special tokens and chat template included. Reads metadata only.

    A vocabulary may lack bytes that its makers never met (SmolLM2's lacks 21, such as control characters and bytes
    that no UTF-8 has): `encode` leaves them out.

    Raises:
      TokenizerError: the file cannot be read, or its tokenizer is not a byte-level BPE with known word patterns.
    """
    fields = _gguf_fields(path)

    def get(key: str, default: Any = None) -> Any:
        field = fields.get(f"tokenizer.{key}")
        return default if field is None else field.contents()

    if (model := get("ggml.model")) != "gpt2":
        raise TokenizerError(f"{path}: tokenizer.ggml.model is {model!r}; only 'gpt2' (byte-level BPE) can be read")
    if (pre := get("ggml.pre", "default")) not in _GGUF_WORDS:
        raise TokenizerError(f"{path}: tokenizer.ggml.pre is {pre!r}; known are: {', '.join(_GGUF_WORDS)}")
    tokens, types = get("ggml.tokens", []), get("ggml.token_type", [])
    if (end := get("ggml.eos_token_id")) is None or len(set(tokens)) != len(tokens) or len(types) != len(tokens):
        raise TokenizerError(f"{path}: needs tokenizer.ggml.eos_token_id, and distinct tokens with a type for each")
    merges = [tuple(merge.split(" ")) for merge in get("ggml.merges", [])]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    core = _byte_level(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"), _GGUF_WORDS[pre])
    if pre == "qwen2":
        core.normalizer = tokenizers.normalizers.NFC()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind != _GGUF_NORMAL]
    core.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in control])
    add_bos = get("ggml.add_bos_token", pre == "llama-bpe")
    return Tokenizer(core, end, get("ggml.bos_token_id") if add_bos else None, get("chat_template"))


def _byte_level(model: models.Model, words: Sequence[str]) -> tokenizers.Tokenizer:
    """A tokenizer that cuts text by each pattern in turn, then spells every byte as a character and merges."""
    core = tokenizers.Tokenizer(model)
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in words]
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    return core


def _copy(core: tokenizers.Tokenizer, parse_special: bool) -> tokenizers.Tokenizer:
    """A copy that finds added tokens in text, or none of them: some files mark control tokens as ordinary ones."""
    content = json.loads(core.to_str())
    for token in content["added_tokens"]:
        token["special"] = True
    copy = tokenizers.Tokenizer.from_str(json.dumps(content))
    copy.no_padding()
    copy.no_truncation()
    copy.encode_special_tokens = not parse_special
    return copy


def _folder(path: epath.PathLike) -> epath.Path:
    """The folder of a tokenizer, also where its main file is named."""
    path = epath.Path(path)
    return path.parent if path.name == _FILE else path


def _read_config(folder: epath.Path) -> dict[str, Any]:
    file = folder / _CONFIG
    if not file.exists():
        return {}
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise TokenizerError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise TokenizerError(f"{file}: should be a JSON object")
    return config


def _special(core: tokenizers.Tokenizer, token: Any) -> int | None:
    """The id of a token that a config names by its text, or by an object with its text."""
    text = token.get("content") if isinstance(token, dict) else token
    return core.token_to_id(text) if isinstance(text, str) else None


def _chat_template(folder: epath.Path, config: dict[str, Any]) -> str | None:
    """The template in the config, the one named `default` where there are several, or the one in its own file."""
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    file = folder / "chat_template.jinja"
    return file.read_text() if template is None and file.exists() else template


def _gguf_fields(path: epath.PathLike) -> dict[str, Any]:
    from gguf import GGUFReader  # slow to import, and only needed here

    try:
        return dict(GGUFReader(str(path)).fields)
    except (OSError, ValueError, IndexError) as error:
        raise TokenizerError(f"{path}: not a readable GGUF file: {error}") from error


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of the byte-level alphabet (GPT-2's) stands for.

    Printable Latin-1 characters stand for themselves; the other bytes, in order, for U+0100 onwards.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
