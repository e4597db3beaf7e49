"""Text to tokens and back, by byte-level BPE (trained here or read from a Hugging Face folder) or Gemma's BPE.

Gemma's BPE is that of SentencePiece, with bytes for what no token spells and without a space before each text. Tokens
stand for bytes, so that the rule book's phrases can be read from them exactly (`token_bytes`). Text is only ever text:
a title that contains "<|end|>" does not become the end token.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers
from etils import epath
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers

from agrl_jax.runtime.files import write_json, write_text

END = "<|end|>"
FILE = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_SPECIAL_TOKENS = "special_tokens_map.json"
_TEMPLATE = "chat_template.jinja"
_ENDS = ("generation_config.json", "config.json")  # of the model: its `eos_token_id` is one id, or several

# Settings that `save` writes itself, or that tokenizer.json holds already.
_REPLACED = {"add_bos_token", "add_eos_token", "added_tokens_decoder", "auto_map", "chat_template", "tokenizer_file"}
_THINKING = "agrl_jax_thinking"  # our own setting: see `Tokenizer.thinking`
_LISTED_ENDS = "agrl_jax_end_tokens"  # our own setting: the end tokens of generation_config.json, which may be absent
_THOUGHT = re.compile(r"[<\[]/?[\w:]*(?:think|thought|reason)\w*[>\]]", re.IGNORECASE)
_DATE = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")

# How text is cut into words before merging, for the tokenizer trained here. A space or line break goes with the
# word that follows and a colon with the word before, so that responses such as "Category: same" are short;
# digits stand alone, so that prices are spelt alike.
_WORDS = r"[ \n]?\p{L}[\p{L}\p{M}]*(?:'\p{L}+)?:?|[ \n]?\p{N}|[ \n]?[^\s\p{L}\p{N}]+|\s"

# How Qwen2 and Qwen3 cut text into words. Version 5 of `transformers` does so for every model of Qwen2's type.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_SPACE = "\u2581"  # how SentencePiece writes a space
SENTENCEPIECE = "a SentencePiece vocabulary, as Llama 2, TinyLlama and Mistral 7B have it"  # for messages: not usable


class TokenizerError(ValueError):
    """A tokenizer that cannot be trained or read; the message names file and key."""


class Tokenizer:
    """A BPE vocabulary whose tokens stand for bytes.

    Attributes:
      vocab_size: number of tokens; ids are 0 to vocab_size - 1.
      end_token: id of the token that ends the responses that we write.
      end_tokens: ids of all tokens that end a response of the model; `end_token` is the first.
      bos_token: id of the token that every prompt starts with; None where the model has none.
      chat_template: the model's own Jinja template for conversations, or None.
      settings: the content of tokenizer_config.json, for `transformers`, and our own settings.
    """

    def __init__(
        self, core: tokenizers.Tokenizer, end_token: int, bos_token: int | None = None,
        chat_template: str | None = None, settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.vocab_size = core.get_vocab_size(with_added_tokens=True)
        self.settings = dict(settings or {})
        others = tuple(token for token in self.settings.get(_LISTED_ENDS, ()) if token != end_token)
        for name, token in (*(("end", end) for end in (end_token, *others)), ("bos", bos_token)):
            if token is not None and not 0 <= token < self.vocab_size:
                raise TokenizerError(f"the {name} token {token} is outside the vocabulary of {self.vocab_size} tokens")
        self.end_token = end_token
        self.end_tokens = (end_token, *others)
        self.bos_token = bos_token
        self.chat_template = chat_template
        self._core = core
        self._parsing = _copy(core, parse_special=True)
        self._text = _copy(core, parse_special=False)

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """The tokens of a text; nothing is added.

        `parse_special` turns the spelling of a special token into that token. A rendered chat template needs this.
        Never set it for text that others wrote.
        """
        core = self._parsing if parse_special else self._text
        return core.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        return [encoding.ids for encoding in self._text.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """The text of the tokens' bytes, with no clean-up; bytes that are not UTF-8 become U+FFFD.

        Special tokens are left out, or spelt out with `special`. Ids past the vocabulary have no text; models with
        padded embeddings can sample them.
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
        sentencepiece = _is_sentencepiece(self._core)
        spell = _sentencepiece_bytes if sentencepiece else _byte_level_bytes
        # In Gemma's BPE, an added token of white space, such as a run of line breaks, stands for text.
        special = {
            i for i, token in self._core.get_added_tokens_decoder().items()
            if token.special or not sentencepiece or token.content.replace(_SPACE, " ").strip()
        }  # fmt: skip
        pieces: list[bytes | None] = []
        for token in range(self.vocab_size):
            spelling = self._text.id_to_token(token)
            if spelling is None or token in special:
                pieces.append(None)
                continue
            try:
                pieces.append(spell(spelling))
            except KeyError as error:
                raise TokenizerError(f"token {token}, {spelling!r}, is not spelt in the byte-level alphabet") from error
        return tuple(pieces)

    @property
    def special_tokens(self) -> dict[str, str]:
        """The spelling of each token that the settings name, such as `bos_token`: what chat templates may use."""
        named = dict(self.settings)
        if isinstance(extra := self.settings.get("extra_special_tokens"), dict):
            named |= extra
        spelt = {name: _text_of(value) for name, value in named.items() if name.endswith("_token")}
        spelt["eos_token"] = self._core.id_to_token(self.end_token)
        if self.bos_token is not None:
            spelt["bos_token"] = self._core.id_to_token(self.bos_token)
        return {name: text for name, text in spelt.items() if text is not None}

    @functools.cached_property
    def marks(self) -> frozenset[int]:
        """Special tokens that a model may write amid text: those around a thought, such as <think>, and added tokens
        that the file does not mark as special. Tokens that the settings name are none: they begin and end texts."""
        extra = {_text_of(token) for token in self.settings.get("additional_special_tokens") or []}
        named = set(self.special_tokens.values())
        return frozenset(
            i for i, token in self._core.get_added_tokens_decoder().items()
            if token.content not in named
            and self._bytes[i] is None
            and (_THOUGHT.fullmatch(token.content) or not (token.special or token.content in extra))
        )  # fmt: skip

    @property
    def thinking(self) -> int:
        """How many tokens a model may think before it answers; 0: prompts ask it not to think. See `with_thinking`."""
        return int(self.settings.get(_THINKING, 0))

    def with_thinking(self, limit: int) -> Tokenizer:
        """The same vocabulary, for prompts that let the model think for `limit` tokens, or with 0 ask it not to think.
        Saved folders keep this setting."""
        settings = {name: value for name, value in self.settings.items() if name != _THINKING}
        settings |= {_THINKING: limit} if limit else {}
        return Tokenizer(self._core, self.end_token, self.bos_token, self.chat_template, settings)

    @property
    def cuts_as_qwen2(self) -> bool:
        """Whether text is normalised and cut into words as Qwen2's is."""
        content = json.loads(self._core.to_str())
        cuts = (content["pre_tokenizer"] or {}).get("pretokenizers", [])
        patterns = [cut["pattern"].get("Regex") for cut in cuts if cut["type"] == "Split"]
        return patterns == [QWEN2_WORDS] and (content["normalizer"] or {}).get("type") == "NFC"

    def ending_with(self, end_token: int) -> Tokenizer:
        """The same vocabulary, with another `end_token`; the other end tokens stay."""
        if end_token == self.end_token:
            return self
        return Tokenizer(self._core, end_token, self.bos_token, self.chat_template, self.settings)

    def within(self, rows: int) -> Tokenizer:
        """The same vocabulary without the tokens past an embedding of `rows` rows: the model cannot read those.

        Raises:
          TokenizerError: such a token is needed: it ends or begins texts, is in the chat template, or is no added
            token.
        """
        if self.vocab_size <= rows:
            return self
        content = json.loads(self._core.to_str())
        past = {token["content"]: token["id"] for token in content["added_tokens"] if token["id"] >= rows}
        template = self.chat_template or ""
        needed = [text for text, i in past.items() if i in (self.end_token, self.bos_token) or text in template]
        if needed or self.vocab_size - len(past) > rows:
            raise TokenizerError(
                f"the tokenizer has {self.vocab_size} tokens, but the embedding only {rows} rows"
                + (f", and none for {needed[0]!r}" if needed else "")
            )
        content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < rows]
        for text in past:
            content["model"]["vocab"].pop(text, None)
        core = tokenizers.Tokenizer.from_str(json.dumps(content))
        settings = dict(self.settings)
        if _LISTED_ENDS in settings:
            settings[_LISTED_ENDS] = [token for token in settings[_LISTED_ENDS] if token < rows]
        return Tokenizer(core, self.end_token, self.bos_token, self.chat_template, settings)

    def save(self, path: epath.PathLike) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json` into a folder, so that versions 4 and 5 of `transformers`
        read the same tokenizer from it.

        The named class takes tokenizer.json as it is. The post-processor adds the beginning token, since version 4
        has no flag for it. Batches are padded by the model's own padding token, or else the end token; on the left,
        unless the settings say otherwise.
        """
        folder = _folder(path)
        folder.mkdir(parents=True, exist_ok=True)
        core = tokenizers.Tokenizer.from_str(self._core.to_str())
        core.no_padding()
        core.no_truncation()
        core.post_processor = self._adding_bos()
        config = {"padding_side": "left", "clean_up_tokenization_spaces": False} | self._settings_that_hold() | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"],
            "eos_token": self._core.id_to_token(self.end_token),
            "pad_token": self._core.id_to_token(self.pad_token),
        }  # fmt: skip
        if self.bos_token is not None:
            config["bos_token"] = self._core.id_to_token(self.bos_token)
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        write_json(folder / _CONFIG, config)
        write_text(folder / FILE, core.to_str(pretty=True))  # last: a folder with this file is complete

    @property
    def pad_token(self) -> int:
        """The id of the token that `transformers` pads batches with."""
        named = _id_of(self._core, self.settings.get("pad_token"))
        return self.end_token if named is None else named

    def _adding_bos(self) -> processors.PostProcessor | None:
        """The step that puts the beginning token before a text, for callers of `transformers`."""
        if self.bos_token is None:
            return None
        bos = self._core.id_to_token(self.bos_token)
        single = [bos, "$A"]
        return processors.TemplateProcessing(single, [*single, "$B:1"], [(bos, self.bos_token)])

    def _settings_that_hold(self) -> dict[str, Any]:
        """The settings without those that `save` replaces, and without names of tokens that the vocabulary lacks."""

        def known(token: Any) -> bool:
            return _text_of(token) is None or _id_of(self._core, token) is not None

        kept = {}
        for name, value in self.settings.items():
            if name in _REPLACED or (name.endswith("_token") and not known(value)):
                continue
            if name.endswith("special_tokens") and isinstance(value, list):
                value = [token for token in value if known(token)]
            elif name.endswith("special_tokens") and isinstance(value, dict):
                value = {key: token for key, token in value.items() if known(token)}
            kept[name] = value
        return kept


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learns a vocabulary of at most `vocab_size` tokens: the end token, the 256 bytes, then merges.

    The same texts give the same vocabulary. There are fewer tokens where the texts have too few words.
    """
    alphabet = sorted(_BYTE_OF)
    if vocab_size < len(alphabet) + 1:
        raise TokenizerError(f"vocab_size={vocab_size} is too small: the bytes and {END} alone are {len(alphabet) + 1}")
    core = byte_level(models.BPE(), (_WORDS,))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    return Tokenizer(core, core.token_to_id(END))


def load(path: epath.PathLike) -> Tokenizer:
    """Reads what `save` wrote, or a Hugging Face folder with a `tokenizer.json` of byte-level BPE or of Gemma's BPE.

    Raises:
      TokenizerError: a file is missing or unreadable, no end token is named, or the vocabulary is of another kind.
    """
    folder = _folder(path)
    try:
        core = tokenizers.Tokenizer.from_str((folder / FILE).read_text())
    except OSError as error:
        kind = f", and tokenizer.model is {SENTENCEPIECE}" if (folder / "tokenizer.model").exists() else ""
        raise TokenizerError(f"{folder / FILE}: cannot be read: {error.strerror or error}{kind}") from error
    except Exception as error:  # the Rust side raises plain Exception
        raise TokenizerError(f"{folder / FILE}: not a tokenizer: {error}") from error
    settings = _settings(folder)
    end = _end_token(folder, core, settings)
    listed = _listed_ends(folder / _ENDS[0], core)
    if _LISTED_ENDS not in settings and listed:  # `ending_with` may put another end in place of the only one
        settings = {**settings, _LISTED_ENDS: listed}
    bos = _id_of(core, settings.get("bos_token"))
    adds_bos = settings.get("add_bos_token")
    if adds_bos is None:
        adds_bos = core.encode("").ids[:1] == [bos]
    tokenizer = Tokenizer(core, end, bos if adds_bos else None, _chat_template(folder, settings), settings)
    try:
        tokenizer.token_bytes()
    except TokenizerError as error:
        kind = f" ({SENTENCEPIECE})" if getattr(core.model, "byte_fallback", False) else ""
        right = "only byte-level vocabularies, and Gemma's, can be used"
        raise TokenizerError(f"{folder / FILE}: {error}{kind}; {right}") from error
    return tokenizer


def _is_sentencepiece(core: tokenizers.Tokenizer) -> bool:
    """Whether this is SentencePiece's BPE as Gemma has it: it writes a space as U+2581, puts nothing before a text, and
    has a token for every byte. Llama 2 puts a space before every text, so its tokens do not spell just the text."""
    if not getattr(core.model, "byte_fallback", False):
        return False
    normalizer = json.loads(core.to_str())["normalizer"] or {}
    return (
        normalizer == {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
        and all(core.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256))
    )


def _sentencepiece_bytes(spelling: str) -> bytes:
    byte = re.fullmatch("<0x([0-9A-F]{2})>", spelling)
    return bytes([int(byte[1], 16)]) if byte else spelling.replace(_SPACE, " ").encode()


def _byte_level_bytes(spelling: str) -> bytes:
    return bytes(_BYTE_OF[character] for character in spelling)


def byte_level(model: models.Model, words: Sequence[str]) -> tokenizers.Tokenizer:
    """A tokenizer that cuts text by each pattern in turn, then spells every byte as a character and merges these."""
    core = tokenizers.Tokenizer(model)
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in words]
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    return core


def _copy(core: tokenizers.Tokenizer, parse_special: bool) -> tokenizers.Tokenizer:
    """A copy that finds all added tokens in text (`parse_special`), or none of them.

    It treats all added tokens as special ones, since some files mark control tokens as ordinary tokens.
    """
    content = json.loads(core.to_str())
    for token in content["added_tokens"]:
        token["special"] = True
    copy = tokenizers.Tokenizer.from_str(json.dumps(content))
    copy.no_padding()
    copy.no_truncation()
    copy.encode_special_tokens = not parse_special
    return copy


def _folder(path: epath.PathLike) -> epath.Path:
    """The folder of a tokenizer, given the folder or its tokenizer.json."""
    path = epath.Path(path)
    return path.parent if path.name == FILE else path


def _settings(folder: epath.Path) -> dict[str, Any]:
    """What a folder says of its tokenizer beside tokenizer.json.

    As in `transformers`, special_tokens_map.json goes before a tokenizer_config.json without `added_tokens_decoder`,
    which is an older one.
    """
    config, tokens = _read_json(folder / _CONFIG), _read_json(folder / _SPECIAL_TOKENS)
    return tokens | config if "added_tokens_decoder" in config else config | tokens


def _read_json(file: epath.Path) -> dict[str, Any]:
    """The object in a file; empty where there is no file."""
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise TokenizerError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{file}: should be a JSON object")
    return content


def _end_token(folder: epath.Path, core: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> int:
    """The end token that the settings name, or else the first that the model's own files name, or else ours."""
    if (named := _id_of(core, settings.get("eos_token"))) is not None:
        return named
    if settings.get("eos_token") is None:
        for file in _ENDS:
            if ids := _listed_ends(folder / file, core):
                return ids[0]
        if (ours := core.token_to_id(END)) is not None:
            return ours
    raise TokenizerError(
        f"{folder / _CONFIG}: eos_token should name a token of the vocabulary, or {_ENDS[0]} have its eos_token_id"
    )


def _listed_ends(file: epath.Path, core: tokenizers.Tokenizer) -> list[int]:
    """The end tokens that one of the model's own files names."""
    ids = _read_json(file).get("eos_token_id")
    ids = [token for token in (ids if isinstance(ids, list) else [ids]) if isinstance(token, int)]
    size = core.get_vocab_size(with_added_tokens=True)
    if strays := [token for token in ids if not 0 <= token < size]:
        raise TokenizerError(f"{file}: eos_token_id {strays[0]} is outside the vocabulary of {size} tokens")
    return ids


def _text_of(token: Any) -> str | None:
    """The spelling of a token in the settings: a string, or an object with the string as its `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _id_of(core: tokenizers.Tokenizer, token: Any) -> int | None:
    text = _text_of(token)
    return None if text is None else core.token_to_id(text)


def _chat_template(folder: epath.Path, settings: Mapping[str, Any]) -> str | None:
    """The template in a file of its own, or else in the settings; the one named `default` where these hold several."""
    file = folder / _TEMPLATE
    template = file.read_text() if file.exists() else settings.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return with_date(template)


def with_date(template: str | None) -> str | None:
    """The template with today's date in place of calls for it. Kept like this, it gives the same prompts on later days.
    """
    now = datetime.datetime.now()
    return template and _DATE.sub(lambda call: json.dumps(now.strftime(call[2])), template)


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of the byte-level alphabet (GPT-2's) stands for.

    Printable Latin-1 characters stand for themselves; the other bytes, in order, for U+0100 onwards.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
