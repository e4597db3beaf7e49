"""The policy computes what `transformers` computes, on PyTorch, for every family it can load.

Without PyTorch, the same models are compared with its recorded logits (`goldens/logits.npz`, which
`python tests/test_parity.py` writes again).
"""

from __future__ import annotations

import contextlib
import functools
import random
import string
import sys
import tempfile
from pathlib import Path
from typing import Any

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agrl_jax.policy import huggingface, loading, smollm2
from agrl_jax.policy.scoring import predicting_hidden, prefill
from agrl_jax.policy.transformer import build, build_expert_load
from agrl_jax.rl.rollout import rollout, row_keys
from agrl_jax.types import ANYWHERE

GOLDENS = Path(__file__).parent / "goldens" / "logits.npz"
LENGTH, KEPT = 600, (slice(None), [0, 7, 300, 599], slice(None, None, 19))  # the recorded part of the logits

cases = pytest.mark.parametrize("case", hf_models.CASES)


@functools.cache
def compiled(cfg):
    """The function from parameters and whole sequences [B, n] to logits [B, n, V]."""
    policy, _, _ = build(cfg)
    return jax.jit(lambda params, tokens: policy.unembed(params, policy.apply(params, tokens[:, None])[0][:, 0]))


def logits(cfg, params, tokens) -> np.ndarray:
    return np.asarray(compiled(cfg)(params, jnp.asarray(tokens)))


@functools.cache
def loaded(case: str):
    """Shape, parameters and tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        hf_models.write(Path(folder), case)
        return loading.load_pretrained(folder)


@functools.cache
def ours(case: str) -> np.ndarray:
    """Our logits of the tokens whose logits are recorded."""
    cfg, params, _ = loaded(case)
    return logits(cfg, params, hf_models.tokens(case, 1, LENGTH, cfg.vocab_size))


def hf_model(folder: Path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def hf_logits(model, tokens, **inputs: Any) -> np.ndarray:
    import torch

    inputs = {name: torch.tensor(np.asarray(value)).long() for name, value in inputs.items()}
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens)).long(), **inputs).logits.numpy()


def hf_random(case: str, folder: Path, vocab_size: int):
    """A model made by `transformers`, saved as `transformers` does."""
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    config = hf_models.config(case, vocab_size)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.2 * noise if "norm" in name else noise * 1.5 * weight.shape[-1] ** -0.5)
    hf_models.tokenizer().save(folder)
    model.save_pretrained(folder)
    return model


def near(logits: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


@cases
def test_logits_are_those_recorded(case):
    with np.load(GOLDENS) as goldens:
        near(ours(case)[KEPT], goldens[case])


@cases
def test_models_made_by_transformers_give_its_logits(case, tmp_path):
    model = hf_random(case, tmp_path, hf_models.tokenizer().vocab_size)
    cfg, params, _ = loading.load_pretrained(tmp_path)
    tokens = hf_models.tokens(case + "!", 1, LENGTH, cfg.vocab_size)
    near(logits(cfg, params, tokens), hf_logits(model, tokens))


@cases
def test_exported_models_give_transformers_our_logits(case, tmp_path):
    cfg, params, tokenizer = loaded(case)
    huggingface.save_pretrained(tmp_path / "out", cfg, params, tokenizer)
    model = hf_model(tmp_path / "out")
    assert model.config.model_type == hf_models.CASES[case]["model_type"].replace("mistral", "llama")
    tokens = hf_models.tokens(case, 1, LENGTH, cfg.vocab_size)
    theirs = hf_logits(model, tokens)
    near(ours(case), theirs)
    with np.load(GOLDENS) as goldens:
        near(theirs[KEPT], goldens[case])


@pytest.mark.parametrize("case", ["llama", "smollm3", "olmo2", "gemma3", "qwen2_yarn", "qwen3_moe"])
def test_padded_prompts_and_shared_prefixes_give_the_logits_of_whole_sequences(case, tmp_path):
    """Prompts of 3 lengths with two responses each. For `transformers`, each is one sequence, padded left or right."""
    cfg, params, _ = loaded(case)
    policy, _, _ = build(cfg)
    prompts, lengths = hf_models.tokens(case, 3, 9, cfg.vocab_size), np.array([9, 4, 6])
    responses = hf_models.tokens(case + "!", 6, 5, cfg.vocab_size).reshape(3, 2, 5)

    @jax.jit
    def run(params, prompts, lengths, responses):
        prefix = prefill(policy, params, prompts, lengths)
        return policy.unembed(params, predicting_hidden(policy, params, prefix, responses))

    found = run(params, prompts, lengths, responses)

    hf_models.write(tmp_path, case)
    model = hf_model(tmp_path)
    for side in ("left", "right"):
        rows, mask = np.zeros((6, 14), np.int64), np.zeros((6, 14), np.int64)
        spans = []
        for i in range(6):
            whole = np.concatenate([prompts[i // 2, : lengths[i // 2]], responses[i // 2, i % 2]])
            start = 14 - len(whole) if side == "left" else 0
            rows[i, start : start + len(whole)], mask[i, start : start + len(whole)] = whole, 1
            spans.append(slice(start + lengths[i // 2] - 1, start + len(whole) - 1))
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
        theirs = hf_logits(model, rows, attention_mask=mask, position_ids=positions)
        expected = np.stack([row[span] for row, span in zip(theirs, spans, strict=True)]).reshape(3, 2, 5, -1)
        near(found, expected)


def test_bfloat16_stays_close_to_float32(tmp_path):
    """The compute dtype reaches every layer: results are rounded to 8 bits, but never far off."""
    hf_models.write(tmp_path, "qwen3")
    tokens = hf_models.tokens("qwen3", 2, 40, hf_models.tokenizer().vocab_size)
    exact, rough = (
        logits(*loading.load_pretrained(tmp_path, param_dtype=dtype, compute_dtype=dtype)[:2], tokens)
        for dtype in ("float32", "bfloat16")
    )
    difference = np.linalg.norm(exact - rough) / np.linalg.norm(exact)
    assert 1e-4 < difference < 0.1


# ------------------------------------------------------------------------------------------- experts


def test_a_mixture_is_its_chosen_experts_weighed():
    """The feed-forward of one layer, computed expert by expert and token by token."""
    cfg, params, _ = loaded("qwen3_moe")
    layer = jax.tree.map(lambda x: np.asarray(x[0], np.float64), params["blocks"]["mlp"])
    x = np.random.default_rng(0).standard_normal((7, cfg.width))
    expected = np.zeros_like(x)
    for row, out in zip(x, expected, strict=True):
        scores = np.exp(row @ layer["router"])
        chosen = np.argsort(-scores)[:2]
        for e in chosen:
            gate, up = row @ layer["gate"][e], row @ layer["up"][e]
            out += scores[e] / scores[chosen].sum() * ((gate / (1 + np.exp(-gate)) * up) @ layer["down"][e])

    from flax import nnx

    from agrl_jax.policy.experts import MixtureOfExperts

    module = MixtureOfExperts(cfg, nnx.Rngs(params=0))
    for name, weight in layer.items():
        setattr(module, name, nnx.Param(jnp.asarray(weight, jnp.float32)))
    found = module(jnp.asarray(x, jnp.float32)[None, None], ANYWHERE)
    np.testing.assert_allclose(found[0, 0], expected, atol=1e-4)


def test_expert_load_counts_choices_of_valid_tokens():
    cfg, params, _ = loaded("qwen3_moe")
    load_of = jax.jit(build_expert_load(cfg))
    tokens = jnp.asarray(hf_models.tokens("load", 3, 10, cfg.vocab_size))
    valid = jnp.arange(10) < jnp.array([10, 4, 4])[:, None]
    whole = load_of(params, tokens, valid)
    np.testing.assert_allclose(whole.share.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(whole.probability.sum(axis=1), 1, rtol=1e-5)
    # The mean over 18 valid tokens of the loads of single rows; each choice counts 1 / (2 * 18).
    rows = [load_of(params, tokens[i : i + 1, :n], jnp.ones((1, n), bool)) for i, n in enumerate((10, 4, 4))]
    mean = sum(row.share * n for row, n in zip(rows, (10, 4, 4), strict=True)) / 18
    np.testing.assert_allclose(whole.share, mean, atol=1e-5)
    np.testing.assert_allclose(whole.share * 36, np.round(whole.share * 36), atol=1e-4)


def test_load_metrics_of_balance_and_of_collapse():
    from agrl_jax.policy.transformer import ExpertLoad

    even = ExpertLoad(jnp.full((2, 4), 0.25), jnp.full((2, 4), 0.25)).metrics()
    assert {k: float(v) for k, v in even.items()} == {
        "experts/balance_loss": 1.0, "experts/max_load": 1.0, "experts/idle": 0.0,
    }  # fmt: skip
    one = jnp.array([[1.0, 0, 0, 0]])
    assert {k: float(v) for k, v in ExpertLoad(one, one).metrics().items()} == {
        "experts/balance_loss": 4.0, "experts/max_load": 4.0, "experts/idle": 0.75,
    }  # fmt: skip


def test_a_policy_without_experts_has_no_load():
    cfg, _, _ = loaded("qwen3")
    with pytest.raises(ValueError, match="policy.experts=0"):
        build_expert_load(cfg)


# ------------------------------------------------------------------------------------------- SmolLM2


@pytest.fixture(scope="session")
def smol(tmp_path_factory):
    """SmolLM2-135M-Instruct as loaded from GGUF, and the folder it was exported to."""
    with contextlib.suppress(smollm2.NotInstalledError):
        path = smollm2.find_smollm2()
        cfg, params, tokenizer = loading.load_pretrained(path)
        folder = tmp_path_factory.mktemp("smol") / "export"
        huggingface.save_pretrained(folder, cfg, params, tokenizer)
        return path, cfg, params, tokenizer, folder
    pytest.skip(f"needs {smollm2.INSTALL}")


def chat(tokenizer, question: str) -> list[int]:
    """A conversation's prompt, rendered by the model's own template."""
    import jinja2

    template = jinja2.Environment().from_string(tokenizer.chat_template)
    messages = [{"role": "user", "content": question}]
    return tokenizer.encode(template.render(messages=messages, add_generation_prompt=True), parse_special=True)


def greedy(cfg, params, prompts: list[list[int]], length: int, end_token: int) -> list[list[int]]:
    policy, _, _ = build(cfg)
    lengths = jnp.array([len(prompt) for prompt in prompts])
    padded = np.zeros((len(prompts), int(lengths.max())), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    keys = row_keys(jnp.array([0, 0], jnp.uint32), 0, 0, jnp.arange(len(prompts)), 1)

    @jax.jit
    def decode(params):
        prefix = prefill(policy, params, jnp.asarray(padded), lengths)
        return rollout(policy, params, prefix, keys, length=length, temperature=0, end_token=end_token)

    out = decode(params)
    return [np.asarray(t)[np.asarray(v)].tolist() for t, v in zip(out.tokens[:, 0], out.valid[:, 0], strict=True)]


QUESTIONS = ["Is a phone case the same product as a phone? Explain.", "Name five kinds of running shoes."]


@pytest.mark.slow
def test_smollm2_exports_the_tensors_of_its_gguf_file(smol):
    """Compared with the `gguf` package's own dequantisation, in the known order of rows of Llama's GGUF files."""
    import gguf
    from safetensors import safe_open

    path, cfg, _, _, folder = smol
    names = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "token_embd": "model.embed_tokens", "output_norm": "model.norm",
    }  # fmt: skip
    with safe_open(folder / "model.safetensors", "np") as exported:
        left = set(exported.keys())
        for tensor in gguf.GGUFReader(path).tensors:
            expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            *layer, key, _ = tensor.name.split(".")
            name = f"model.layers.{layer[1]}.{names[key]}.weight" if layer else f"{names[key]}.weight"
            if key in ("attn_q", "attn_k"):  # pair i of a head has rows 2i and 2i + 1 there, i and i + 32 here
                heads = range(0, len(expected), 64)
                expected = expected[[head + 2 * i + half for head in heads for half in (0, 1) for i in range(32)]]
            np.testing.assert_array_equal(exported.get_tensor(name), expected, err_msg=name)
            left.remove(name)
    assert not left


@pytest.mark.slow
def test_smollm2_agrees_with_transformers_and_survives_the_round_trip(smol):
    """The export holds the parameters of the GGUF file, and `transformers` gives our logits and greedy tokens from it.

    Its likeliest tokens are ours, except where rounding decides: two logits may be nearer to each other than the two
    libraries, which are 1.1e-4 apart. Each library gave the same bits in 60 runs, beside other jobs.
    """
    _, cfg, params, tokenizer, folder = smol
    prompts = [chat(tokenizer, question) for question in QUESTIONS]
    ours = greedy(cfg, params, prompts, 64, tokenizer.end_token)
    assert any(len(answer) == 64 for answer in ours)

    again, reloaded, _ = loading.load_pretrained(folder)
    assert again == cfg
    jax.tree.map(np.testing.assert_array_equal, params, reloaded)
    del reloaded

    model = hf_model(folder)
    for prompt, answer in zip(prompts, ours, strict=True):
        whole = np.array([prompt + answer])
        theirs = hf_logits(model, whole)
        np.testing.assert_allclose(logits(cfg, params, whole), theirs, atol=1e-3)
        before = theirs[0, len(prompt) - 1 : -1]  # the logits by which each token of the answer was chosen
        chosen = np.take_along_axis(before, np.array(answer)[:, None], axis=1)[:, 0]
        np.testing.assert_allclose(chosen, before.max(axis=1), atol=2e-3)


def strings(count: int, special: list[str]) -> list[str]:
    """Texts of all kinds: any Unicode, whitespace, digits, words, special tokens."""
    rng = random.Random(0)
    alphabets = [
        string.printable, " \t\n\r\u00a0\u2003\u200b", string.digits + ".,$%½²٣", "àéîõüßñçøåæœ'’", "привет мир",
        "你好世界こんにちは", "😀👍🏽👨‍👩‍👧🇫🇷", "مرحبا שלום नमस्ते",
    ]  # fmt: skip
    words = "don't I'LL we've Nike's USB-C 4-Excellent under $50.00 size 12.5 x-large Größe".split()

    def piece() -> str:
        kind = rng.randrange(5)
        if kind == 0:
            return " ".join(rng.choices(words, k=rng.randrange(1, 6)))
        if kind == 1:
            return rng.choice(special)
        if kind == 2:
            points = (rng.randrange(0x110000) for _ in range(rng.randrange(1, 8)))
            return "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)
        return "".join(rng.choices(rng.choice(alphabets), k=rng.randrange(1, 12)))

    return ["".join(piece() for _ in range(rng.randrange(1, 5))) for _ in range(count)]


def reference_tokenizer(path: Path):
    """SmolLM2's tokenizer for `transformers`, as its authors define it (digits one by one, then GPT-2's byte-level
    pattern), with the vocabulary in the file."""
    import gguf
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = gguf.GGUFReader(path).fields
    tokens, merges, types = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges", "token_type"))
    core = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges]))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == 3]
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=core), special


@pytest.mark.slow
def test_smollm2_tokenizer_is_that_of_transformers_on_10_000_strings(smol):
    """Ours is rebuilt from GGUF, or written and read back; `transformers` also reads the one that we wrote."""
    from transformers import AutoTokenizer

    path, _, _, tokenizer, folder = smol
    reference, special = reference_tokenizer(path)
    texts = strings(10_000, special)
    assert len(set(texts)) > 9_000

    def theirs(hf) -> tuple[list[list[int]], list[list[int]]]:
        hf_encode = functools.partial(hf, texts, add_special_tokens=False, return_attention_mask=False)
        return hf_encode().input_ids, hf_encode(split_special_tokens=True).input_ids

    parsed, plain = theirs(reference)
    assert theirs(AutoTokenizer.from_pretrained(folder)) == (parsed, plain)
    for ours in (tokenizer, loading.load_pretrained(folder)[2]):
        assert [ours.encode(text, parse_special=True) for text in texts] == parsed
        assert ours.encode_batch(texts) == plain
        assert [ours.decode(ids, special=True) for ids in parsed] == reference.batch_decode(
            parsed, clean_up_tokenization_spaces=False
        )
    assert reference.convert_ids_to_tokens(tokenizer.end_token) == "<|im_end|>"


def record() -> None:
    """Writes the goldens: logits of `transformers` for the models of `hf_models`."""
    goldens = {}
    for case in hf_models.CASES:
        with tempfile.TemporaryDirectory() as folder:
            hf_models.write(Path(folder), case)
            model = hf_model(Path(folder))
            tokens = hf_models.tokens(case, 1, LENGTH, model.config.vocab_size)
            goldens[case] = hf_logits(model, tokens)[KEPT]
    GOLDENS.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDENS, **goldens)


if __name__ == "__main__":
    sys.exit(record())
