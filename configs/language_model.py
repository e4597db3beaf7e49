"""What the configs of pretrained language models share; each of them changes a few fields more.

Without an argument of its own: use `smollm2_135m.py`, `qwen3_0p6b.py`, `qwen3_8b.py` or `qwen3_30b_a3b.py`, or write
one like them for another model of the Llama, Qwen2, Qwen3 or Qwen3-MoE family.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def base() -> ConfigDict:
    """AGRL for a language model that can follow instructions, on the bundled benchmark."""
    c = common.base()
    c.data.style = "chat"  # the rule book's instructions, through the model's own chat template
    c.data.prompt_len = 768  # the instructions take some 650 tokens, query and item 60
    c.data.response_len = 40  # a subword vocabulary spells the longest gold answer in about 30
    c.reward.overlong_from = 32

    c.policy.compute_dtype = "bfloat16"  # parameters stay in float32: in bfloat16 they would lose small updates
    c.policy.remat = True  # of a 768-token prompt, attention weights alone are 2 MB for each head of each layer

    # Fine-tuning: it knows its language, and has to learn the form of the answer and then the judging.
    c.sft.steps = 300
    c.sft.batch_size = 32
    c.sft.learning_rate = 2e-5
    c.sft.matrix_rate = 0.0  # AdamW alone: orthogonalised steps would rewrite what pretraining left
    c.sft.weight_decay = 0.0
    c.sft.prompt_weight = 0.0  # nor has it to learn the language of prompts
    c.rl.steps = 200
    c.rl.batch_size = 32
    c.rl.group_size = 8  # a prompt is long and computed once for its group: more answers cost little
    c.rl.micro_batches = 4
    c.rl.learning_rate = 1e-6
    c.rl.matrix_rate = 0.0
    c.dpo.update(mined=3200, batch_size=32, learning_rate=1e-6, matrix_rate=0.0)
    c.objective.logprob_chunk = 1024  # with 150,000 tokens in a vocabulary, 0.6 GB of logits
    c.guidance.replace = 4  # of 8
    c.eval.batch_size = 32
    return c
