"""Every field of a run with its default and its meaning; the methods; what the configs in `configs/` import.

A config is a function `get_config(arg)` that returns an ml_collections ConfigDict. Any field can be
changed on the command line: `--config.rl.steps=100`. Ranges are in `runtime/config.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict

from agrl_jax.runtime.config import FILES, flatten, last_branch, raise_problems


def as_long_as_rl(c: ConfigDict) -> int:
    """Steps of supervised training that cost as many forward-equivalent tokens as RL does.

    All lengths count in full; replays and shared instructions are left out. A step of RL samples (1), scores with a
    reference (1) and trains on (3 for each epoch) B prompts with G answers each. A supervised step trains on (3)
    prompts with one answer.
    """
    s, t = c.data.prompt_len, c.data.response_len
    passes = 1 + (c.objective.kl != "none") + 3 * c.rl.epochs
    rl = passes * c.rl.batch_size * (s + c.rl.group_size * t)
    return round(c.rl.steps * rl / (3 * c.more.batch_size * (s + t)))


# Each method by the fields in which it differs from AGRL; a function gives a field's value from the config.
# `--config=configs/quickstart.py:grpo` chooses one.
METHODS: dict[str, dict[str, object]] = {
    # Adaptive guided RL: rule-aware reward shaping and adaptive guided replay, on top of GRPO.
    "agrl": {},
    # Rule-aware reward shaping alone.
    "rrs": {"guidance.enabled": False},
    # Adaptive guided replay alone.
    "agr": {"reward.composition": "terminal"},
    # GRPO with process rewards: steps are rewarded too, added up without a gate.
    "grpo_pr": {"guidance.enabled": False, "reward.composition": "sum"},
    # Group relative policy optimisation: only the tier is rewarded.
    "grpo": {"guidance.enabled": False, "reward.composition": "terminal"},
    # GRPO with dynamic sampling: groups whose answers all earn the same are replaced by others.
    "grpo_ds": {"guidance.enabled": False, "reward.composition": "terminal", "rl.candidates": 4},
    # Direct preference optimisation in place of RL, on answers sampled from the warm start.
    "dpo": {},
    # Distillation in place of RL: a student that states the tier first learns the tier probabilities of another judge.
    "distill": {
        "rulebook.order": "respond_then_think", "guidance.enabled": False,
        "distill.learning_rate": lambda c: c.sft.learning_rate / 3,
        "distill.matrix_rate": lambda c: 0.4 * c.sft.matrix_rate,
        "distill.batch_size": lambda c: c.sft.batch_size, "distill.micro_batches": lambda c: c.sft.micro_batches,
    },
    # Supervised fine-tuning: the warm start alone.
    "sft": {"rl.steps": 0},
    # Supervised training goes on, for as many tokens as RL would take.
    "sft_more": {"more.steps": as_long_as_rl},
    # Supervised training goes on for as many tokens, on all pairs that RL sees.
    "sft_all": {"more.steps": as_long_as_rl, "more.source": "train"},
}


def base() -> ConfigDict:
    """The defaults: AGRL for a small policy trained from scratch on the bundled benchmark."""
    c = ConfigDict()
    c.seed = 0  # of parameters, batches and sampling
    c.method = "agrl"  # one of METHODS; the fields must agree with it. It names the stage after the warm start

    c.rulebook = ConfigDict()  # the business's rules
    c.rulebook.path = "four_tier"  # a bundled rule book by name, or the path of a YAML file
    c.rulebook.order = "think_then_respond"  # or respond_then_think: the tier first
    c.rulebook.free_text = "book"  # as the rule book says; or between, which leaves room for reasons, or none
    # Training pairs are spread over this many variants of the rule book besides itself: other tables and other words,
    # each in the prompts of its pairs. Needs data.style=full or chat. 0: all are judged by the book itself.
    c.rulebook.variants = 0

    c.data = ConfigDict()  # pairs and prompts
    # The pairs of RL and of the scorecard. benchmark: the bundled one; pairs: a file of yours; hf: a folder or file of
    # the library `datasets`; esci, wands: the folder of the public release.
    c.data.source = "benchmark"
    c.data.path = ""  # the file (CSV, TSV, JSON lines, perhaps compressed, or Parquet) or the folder
    # For pairs and hf, the test pairs; empty: they are split off, or the column `split` marks them. For the benchmark,
    # a file of pairs that are judged too, as the split `test`.
    c.data.test_path = ""
    c.data.columns = ""  # names of our columns in files and datasets, where they differ: "{title: product_title}"
    c.data.labels = ""  # the tier of each label, by name or grade, "{E: 4, S: 3, C: 2, I: 1}"
    c.data.bins = ""  # or the lowest rating of each tier but the worst, "[1.5, 2.5, 3.5]": 2.33 is the second lowest
    c.data.on_bad_rows = "refuse"  # a file with a row that cannot be used; skip: such rows are left out and reported
    c.data.dir = ""  # where the benchmark is kept; empty: WORKDIR/data, or ~/.cache/agrl_jax if that is a bucket
    c.data.seed = 0  # of the benchmark, and of the split of a file without a `split` column
    c.data.steps_known = -1  # training pairs that keep their steps; others keep only the tier. -1: all keep steps
    c.data.prompt_len = 40  # S, tokens after the instructions; longer item texts are shortened
    c.data.response_len = 17  # T, tokens
    c.data.style = "terse"  # full: with the rule book's instructions; chat: full, through the model's chat template

    c.policy = ConfigDict()  # the language model
    # A Hugging Face folder, a GGUF file, a folder of adapters, smollm2, or the judge in the box, smollm2-four-tier; the
    # shape below, down to norm_eps, is then the model's own, and kept in WORKDIR/policy.json. Empty: from scratch.
    c.policy.pretrained = ""
    c.policy.vocab_size = 2000  # of the byte-level BPE trained on the training text
    c.policy.width = 128  # D
    c.policy.layers = 4  # L
    c.policy.heads = 4  # H
    c.policy.kv_heads = 2  # K
    c.policy.head_dim = 32  # dimensions of each head; even
    c.policy.mlp = 352  # hidden width of the feed-forward network
    c.policy.tied = False  # one matrix for embedding and head; with two, rare words keep their own direction
    c.policy.qk_norm = True  # RMSNorm of queries and keys, as in Qwen3
    c.policy.bias = False  # of queries, keys and values, as in Qwen2
    c.policy.rope_theta = 10_000.0  # base of the rotary positions
    c.policy.norm_eps = 1e-6  # added to the mean square that RMSNorm divides by
    c.policy.param_dtype = "float32"  # of the parameters as they are trained and kept
    c.policy.compute_dtype = "float32"  # of activations and products; bfloat16 is faster where a machine multiplies it
    c.policy.remat = False  # recompute layers in the backward pass, to save memory
    # dense: attention holds the scores of all tokens by all. blockwise: those of a block at a time, so that memory does
    # not grow with the square of the length. kernel: so too, but TPUs go forward by JAX's kernel, where it can be used
    # (bfloat16, head_dim a multiple of 128, no sliding window). auto: dense on CPUs, and where a token sees fewer than
    # 1024 keys; else blockwise, since the kernel has not been timed.
    c.policy.attention = "auto"
    c.policy.thinking = "off"  # on: the model is asked to think before it answers; for rule books with free text
    c.policy.thought_len = 256  # tokens after which a thought is closed by force

    c.lora = ConfigDict()  # low-rank adapters, trained in place of the policy's weights
    c.lora.rank = 0  # 0: no adapters, all weights are trained; with adapters, learning rates are about ten times larger
    c.lora.alpha = 16.0  # the adapters' product is scaled by alpha / rank
    c.lora.modules = "q,k,v,out,gate,up,down"  # matrices of each layer that have adapters
    c.lora.stages = "both"  # or rl: the warm start trains all weights, and its result is the base of the adapters
    c.lora.start = ""  # adapters that the warm start goes on with: a folder from agrl_jax.export, or smollm2-four-tier
    c.lora.base_dtype = "bfloat16"  # of the base, which is not trained; the adapters are float32

    c.optim = ConfigDict()  # the optimiser of every stage
    c.optim.kind = "adamw"  # or adafactor: no momentum, and second moments only of rows and columns
    c.optim.moments = "float32"  # dtype in which AdamW and Muon keep moments; bfloat16: half the memory
    c.optim.clip_norm = 1.0  # a gradient with a larger norm is scaled down to this norm; 0: no limit
    c.optim.b1 = 0.9  # decay of AdamW's mean gradient
    c.optim.b2 = 0.95  # decay of AdamW's mean squared gradient
    c.optim.eps = 1e-8  # added to the root that AdamW divides by

    c.sft = ConfigDict()  # the supervised warm start
    # Pairs of the warm start: one source or several, joined by "+", as in "benchmark_train+pairs". benchmark: the `sft`
    # split of the bundled benchmark; benchmark_train: its `train` split; train: the pairs that RL sees; known: those
    # pairs of train whose steps are all known; pairs, hf, esci, wands: the training pairs at sft.path; both:
    # benchmark+train; mixture: benchmark_train and train, mixed by the fields of `mixture`.
    c.sft.source = "benchmark"
    c.sft.path = ""  # a file of pairs, read by data.columns, labels and bins, or the folder of the release
    c.sft.steps = 600  # updates
    c.sft.batch_size = 32  # pairs
    c.sft.micro_batches = 1  # pieces of each batch: less memory
    c.sft.learning_rate = 3e-3  # peak; cosine decay to 0
    c.sft.matrix_rate = 0.01  # peak of Muon, which trains the layers' matrices; 0: AdamW trains all
    c.sft.warmup = 30  # steps in which the learning rate rises from 0
    c.sft.weight_decay = 0.01  # decoupled, of matrices alone
    c.sft.prompt_weight = 0.1  # of the prompts' own tokens in the loss: a policy from scratch learns from them too
    # How pairs with unknown steps teach. fill: the policy fills these steps in, and the loss is over what is known;
    # sum: the loss is of the label's probability, summed over all steps that agree with the label.
    c.sft.unknown_steps = "fill"
    c.sft.by_length = False  # batches have pairs of similar length, and are only as wide as their longest prompt

    c.mixture = ConfigDict()  # what sft.source=mixture is made of; see agrl_jax/data/mixture.py
    c.mixture.rows = 24_000  # pairs in all
    c.mixture.real = 0.3  # share of `train`, the pairs of real shops; they are repeated to reach it
    c.mixture.strangers = 0.05  # share of real queries with items of other queries; their tier is the worst
    c.mixture.disguised = 0.7  # share of the benchmark's pairs that are rewritten as a marketplace would write them

    c.rl = ConfigDict()  # reinforcement learning
    c.rl.source = "train"  # the training pairs of data.source; or sft: those of the warm start, such as a mixture
    c.rl.steps = 400  # rollouts, each with rl.epochs x rl.minibatches updates; 0: no RL
    c.rl.budget = 0  # forward-equivalent tokens (`budget/spent`) after which the stage ends, if sooner; 0: no limit
    c.rl.batch_size = 64  # B, examples
    c.rl.group_size = 4  # G, answers to each
    c.rl.candidates = 1  # at most this times B examples are sampled, to replace groups of equal rewards; rl/refill.py
    c.rl.temperature = 1.0  # of sampling; the loss takes log-probabilities at the same temperature
    c.rl.constrained = False  # sample under the rule book's grammar; the loss is over the same allowed tokens
    c.rl.epochs = 1  # passes over each rollout
    c.rl.minibatches = 1  # updates in each pass
    c.rl.micro_batches = 1  # pieces of each minibatch: less memory, and no work for pieces where no group can teach
    c.rl.sample_batches = 1  # pieces in which the batch is sampled: less memory for keys and values
    c.rl.learning_rate = 3e-4  # peak
    c.rl.matrix_rate = 0.004  # as in sft
    c.rl.schedule = "cosine"  # after warm-up: to 0 at the end; or constant
    c.rl.warmup = 20  # steps in which the learning rate rises from 0
    c.rl.weight_decay = 0.0  # decoupled, of matrices alone
    c.rl.max_skipped = 10  # updates in a row skipped as not finite before the run stops

    c.difficulty = ConfigDict()  # sampling of examples by the policy's own pass rates; see agrl_jax/rl/difficulty.py
    c.difficulty.pool = 1  # each step chooses its B examples from this times B, by the band; 1: no choice
    c.difficulty.low = 0.01  # lowest pass rate of the band; rows of which no answer passes are below it
    c.difficulty.high = 0.99  # highest pass rate of the band; rows of which all answers pass are above it
    c.difficulty.again = 100  # steps after which a row outside the band comes back, since the policy has changed

    c.dpo = ConfigDict()  # in place of rl where the method is dpo; see agrl_jax/supervised/dpo.py
    c.dpo.samples = 8  # answers to each training pair, at rl.temperature; right ones are preferred to wrong ones
    c.dpo.mined = 12_800  # training pairs that are answered, stratified; 0: all
    c.dpo.pairs = 1  # most preferences from one training pair
    c.dpo.beta = 0.1  # how strongly the policy is held to the reference
    c.dpo.steps = 400  # updates
    c.dpo.batch_size = 64  # preferences
    c.dpo.micro_batches = 1  # as in sft
    c.dpo.learning_rate = 3e-4  # peak; cosine decay to 0
    c.dpo.matrix_rate = 0.002  # as in sft
    c.dpo.warmup = 20  # steps in which the learning rate rises from 0

    c.more = ConfigDict()  # in place of rl where the method is sft_more or sft_all: supervised training goes on
    c.more.source = "sft"  # the pairs of the warm start; or train: the pairs that RL sees, see rl.source
    c.more.steps = 400  # updates; sft_more and sft_all set it to what RL would cost
    c.more.batch_size = 32  # pairs
    c.more.micro_batches = 1  # as in sft
    c.more.learning_rate = 1e-3  # peak; cosine decay to 0
    c.more.matrix_rate = 0.004  # as in sft
    c.more.warmup = 20  # steps in which the learning rate rises from 0

    c.distill = ConfigDict()  # in place of rl where the method is distill; see agrl_jax/supervised/distill.py
    c.distill.path = ""  # judged pairs, as agrl_jax.judge writes them; they need no labels
    c.distill.columns = ""  # the file's names of our columns, "{title: product_title}"
    c.distill.teacher = ""  # the judge whose weights the student starts from, for agrl_jax.distill; empty: warm start
    c.distill.steps = 1000  # updates
    c.distill.batch_size = 32  # pairs; the method takes this, the pieces and the rates from sft
    c.distill.micro_batches = 1  # as in sft
    c.distill.learning_rate = 1e-3  # peak; cosine decay to 0
    c.distill.matrix_rate = 0.004  # as in sft
    c.distill.warmup = 20  # steps in which the learning rate rises from 0
    c.distill.step_weight = 0.3  # of the steps that follow the tier in an answer

    c.reward = ConfigDict()  # what an answer earns; see agrl_jax/rl/reward.py
    c.reward.composition = "gated"  # terminal, sum, gated, gated_tier
    c.reward.tier_kind = "exact"  # or ordinal: the nearer the tier the more; brier, rps: scores of probabilities
    c.reward.tier_weight = 1.0  # of the right tier
    c.reward.step_weight = 1.0  # of each step; if it is far below tier_weight, wrong steps that give the right tier pay
    c.reward.consistent_weight = 0.25  # of steps that imply the stated tier
    c.reward.format_weight = 0.1  # of an answer that the grammar accepts
    c.reward.overlong_weight = 0.1  # of the penalty for length, which rises from overlong_from to response_len
    c.reward.overlong_from = 16  # tokens from which length is penalised; the longest gold answer has 16

    c.objective = ConfigDict()  # the loss; see agrl_jax/rl/objective.py
    c.objective.loss = "grpo"  # grpo, dr_grpo, dapo, gspo, cispo, rloo
    c.objective.credit = "step"  # a step's reward goes to the tokens of that step; or sequence: to all tokens
    c.objective.clip_low = 0.2  # the ratio of new to old probability is clipped at 1 - clip_low from below
    c.objective.clip_high = 0.2  # and at 1 + clip_high from above; DAPO takes 0.28
    c.objective.gspo_clip_low = 3e-4  # clip_low of gspo, whose ratios are geometric means over an answer
    c.objective.gspo_clip_high = 4e-4  # clip_high of gspo; both as in its paper
    c.objective.clamp = 0.0  # advantages of tokens are limited to -clamp ... clamp; 0: no limit
    c.objective.kl = "none"  # to the end of the warm start; k1: subtracted from the reward; k2, k3: in the loss
    c.objective.kl_weight = 0.0  # of the KL term
    c.objective.entropy_weight = 0.003  # of the entropy bonus
    c.objective.mask_truncated = False  # answers without an end give no gradient
    c.objective.logprob_chunk = 0  # positions whose logits a device holds at once, then recomputes; 0: all are kept

    c.guidance = ConfigDict()  # guided replay; see agrl_jax/rl/guidance.py
    c.guidance.enabled = True  # groups that fail answer again, after being given the first parts of the gold answer
    c.guidance.threshold = 0.0  # a group fails where at most this share of its answers passes
    c.guidance.capacity = 0.5  # largest share of the batch's groups that are guided
    c.guidance.replace = 2  # answers of a guided group that are rolled again
    c.guidance.source = "gold"  # own: where the truth is unknown, the policy's latest right answer to the pair
    c.guidance.treatment = "imitate"  # of forced tokens in the loss: shaped, imitate, importance, mask
    c.guidance.gamma = 0.1  # of treatment shaped: a forced token of probability p has loss -A p / (p + gamma)
    c.guidance.imitate_weight = 1.0  # of imitate; 1: as a sampled token with advantage 1 in an answer of T tokens
    c.guidance.baseline = "pooled"  # mean over a guided group's answers; unguided_only: over its unguided answers
    c.guidance.level = "adaptive"  # or fixed, at initial_level
    c.guidance.initial_level = 4.0  # parts of the gold response revealed at first
    c.guidance.eta = 0.2  # how fast the level follows the guided pass rate
    c.guidance.per_family = True  # one level for each query family
    c.guidance.cap = "none"  # linear or cosine: an upper bound of the level, which falls to 0 over training

    c.eval = ConfigDict()  # validation and the scorecard
    c.eval.every = 50  # RL steps between validations; 0: only at the end
    c.eval.pairs = 500  # of each split, stratified and fixed; 0: all
    c.eval.validation_pairs = 256  # pairs of each validation; 0: all
    c.eval.pass_k = 8  # samples of each pair for pass@k and majority@k
    c.eval.pass_pairs = 128  # pairs sampled so
    c.eval.constrained = False  # judge under the rule book's grammar, as agrl_jax.judge does
    c.eval.batch_size = 128  # pairs judged at once
    c.eval.bootstrap = 1000  # resamples of the 95% intervals

    c.checkpoint = ConfigDict()  # a resumed run goes on from the last checkpoint
    c.checkpoint.every = 50  # steps
    c.checkpoint.keep = 2  # latest ones, besides the best by validation and the end of the warm start

    c.log = ConfigDict()  # metrics and samples
    c.log.every = 1  # steps
    c.log.samples_every = 25  # steps between decoded rollouts
    c.log.samples = 2  # examples decoded each time

    c.mesh = ConfigDict()  # devices along each axis; -1: all remaining ones
    c.mesh.data = -1  # the batch is split over them
    c.mesh.fsdp = 1  # the batch, the parameters and the optimiser are split over them
    c.mesh.tensor = 1  # heads, feed-forward, vocabulary and experts are split over them
    c.mesh.gather_decode = True  # gather weights once for each rollout; False: for each token, which takes less memory
    return c


def pairs() -> ConfigDict:
    """AGRL for the same small policy, on a file of labelled pairs, `data.path`, whose steps may be unknown."""
    c = base()
    c.data.source = "pairs"
    c.data.prompt_len = 96  # real titles are longer
    c.policy.vocab_size = 4000  # and their words more varied
    c.rl.steps = 150
    c.guidance.source = "own"  # most real pairs have the tier alone
    c.guidance.threshold = 0.25  # a group with one right answer of four is guided by that answer, the first time too
    c.eval.every = 25
    return c


def language_model() -> ConfigDict:
    """AGRL for a language model that can follow instructions, on the bundled benchmark."""
    c = base()
    c.data.style = "chat"  # the rule book's instructions, through the model's own chat template
    c.data.prompt_len = 112  # query and item take about 60 tokens; the instructions, 650 tokens, are run once for all
    c.data.response_len = 40  # a subword vocabulary spells the longest gold answer in about 30
    c.reward.overlong_from = 32

    c.policy.compute_dtype = "bfloat16"  # parameters stay in float32: in bfloat16 they would lose small updates
    c.policy.remat = True  # without it, attention weights alone take 32 x 432 x 760 x 4 bytes a head and layer: 42 MB

    # The model knows its language. It has to learn the form of the answer, and then to judge.
    c.sft.steps = 300
    c.sft.batch_size = 32
    c.sft.learning_rate = 2e-5
    c.sft.matrix_rate = 0.0  # AdamW alone: Muon's orthogonalised steps would overwrite what pretraining learnt
    c.sft.weight_decay = 0.0
    c.sft.prompt_weight = 0.0  # the language of prompts is known too
    c.rl.steps = 200
    c.rl.batch_size = 32
    c.rl.group_size = 8  # a prompt is long and computed once for its group: more answers cost little
    c.rl.micro_batches = 4
    c.rl.learning_rate = 1e-6
    c.rl.matrix_rate = 0.0
    c.dpo.update(mined=3200, batch_size=32, learning_rate=1e-6, matrix_rate=0.0)
    c.more.update(learning_rate=1e-5, matrix_rate=0.0)
    c.distill.matrix_rate = 0.0
    c.objective.logprob_chunk = 1024  # 0.6 GB of logits with a vocabulary of 150,000 tokens
    c.guidance.replace = 4  # of 8
    c.eval.batch_size = 32
    return c


def with_method(config: ConfigDict, method: str) -> ConfigDict:
    """`config` changed to one of METHODS."""
    config.method = method
    with config.unlocked():
        fields = {name: value(config) if callable(value) else value for name, value in METHODS[method].items()}
        config.update_from_flattened_dict(fields)
    return config


def check(config: ConfigDict) -> None:
    """Raises ConfigError if the fields do not agree with the method, or if a changed field has no effect with the
    others. One message lists all problems."""
    raise_problems([*_method_problems(config), *_idle_problems(config)])


def rl_method(config: ConfigDict) -> str:
    """The name of the method of RL that these fields make."""
    terminal = config.reward.composition == "terminal"
    if config.guidance.enabled:
        return "agr" if terminal else "agrl"
    if terminal:
        return "grpo_ds" if config.rl.candidates > 1 else "grpo"
    return "grpo_pr" if config.reward.composition == "sum" else "rrs"


def _method_problems(config: ConfigDict) -> Iterator[str]:
    method = config.method
    if method not in METHODS:
        yield f"method is {method!r}, expected one of {', '.join(METHODS)}"
        return
    advice = f"choose a method by the argument of the config, --config=FILE:{method}"
    if method == "sft":
        if config.rl.steps:
            yield f"method=sft with rl.steps={config.rl.steps}: it makes no step of RL; {advice}"
    elif last_branch(method) == "more":
        source = METHODS[method].get("more.source", "sft")
        if config.more.source != source:
            yield f"method={method} with more.source={config.more.source}: it trains on {source}; {advice}"
    elif method == "distill" and config.rulebook.order != "respond_then_think":
        yield f"method=distill with rulebook.order={config.rulebook.order}: a student states the tier first; {advice}"
    elif last_branch(method) == "rl" and method != rl_method(config):
        names, fields = ("guidance.enabled", "reward.composition", "rl.candidates"), flatten(config)
        values = ", ".join(f"{name}={fields[name]}" for name in names)
        yield f"method={method} with {values}: that is {rl_method(config)}; {advice}, or set method to what it is"


# (field, other field, test): the field has an effect only if the value of the other field passes the test.
_ACTS: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("data.path", "data.source", lambda source: source != "benchmark"),
    ("data.test_path", "data.source", lambda source: source in ("pairs", "hf", "benchmark")),
    ("sft.path", "sft.source", lambda source: bool(FILES.intersection(source.split("+")))),
    *((f"mixture.{name}", "sft.source", lambda source: "mixture" in source.split("+"))
      for name in ("rows", "real", "strangers", "disguised")),
    *((f"difficulty.{name}", "difficulty.pool", lambda pool: pool > 1) for name in ("low", "high", "again")),
    ("objective.kl_weight", "objective.kl", lambda kl: kl != "none"),
    ("policy.thought_len", "policy.thinking", lambda thinking: thinking == "on"),
    ("rl.constrained", "method", lambda method: last_branch(method) == "rl"),
    ("objective.clip_low", "objective.loss", lambda loss: loss not in ("gspo", "rloo")),
    ("objective.clip_high", "objective.loss", lambda loss: loss not in ("gspo", "rloo")),
    ("objective.gspo_clip_low", "objective.loss", lambda loss: loss == "gspo"),
    ("objective.gspo_clip_high", "objective.loss", lambda loss: loss == "gspo"),
    ("reward.step_weight", "reward.composition", lambda composition: composition != "terminal"),
    ("reward.consistent_weight", "reward.composition", lambda composition: composition != "terminal"),
    ("reward.format_weight", "reward.composition", lambda composition: composition != "terminal"),
    ("optim.moments", "optim.kind", lambda kind: kind == "adamw"),
    ("optim.b1", "optim.kind", lambda kind: kind == "adamw"),
    ("optim.b2", "optim.kind", lambda kind: kind == "adamw"),
    ("optim.eps", "optim.kind", lambda kind: kind == "adamw"),
    ("guidance.gamma", "guidance.treatment", lambda treatment: treatment == "shaped"),
    ("guidance.imitate_weight", "guidance.treatment", lambda treatment: treatment == "imitate"),
    ("guidance.eta", "guidance.level", lambda level: level == "adaptive"),
    ("guidance.per_family", "guidance.level", lambda level: level == "adaptive"),
)


def _idle_problems(config: ConfigDict) -> Iterator[str]:
    fields, defaults = flatten(config), flatten(base())
    sources = {config.data.source, *config.sft.source.split("+")}
    if not sources & {"pairs", "hf"} and not config.data.test_path:
        for name in ("data.columns", "data.labels", "data.bins", "data.on_bad_rows"):
            if fields[name] != defaults[name]:
                yield (f"{name}={fields[name]} has no effect without a file of pairs in data.source, sft.source or "
                       "data.test_path")
    for name, other, acts in _ACTS:
        if fields[name] != defaults[name] and not acts(fields[other]):
            yield f"{name}={fields[name]} has no effect with {other}={fields[other]}"
    if config.objective.kl != "none" and not config.objective.kl_weight:
        yield f"objective.kl={config.objective.kl} has no effect with objective.kl_weight=0"
    if config.guidance.baseline == "unguided_only" and config.guidance.replace == config.rl.group_size:
        yield (f"guidance.baseline=unguided_only has no effect with guidance.replace={config.guidance.replace} of "
               f"rl.group_size={config.rl.group_size}: no answer of a guided group is unguided")
