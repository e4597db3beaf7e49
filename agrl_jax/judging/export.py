"""A trained judge as a Hugging Face folder with rule book, settings and model card; see `agrl_jax.export`."""

from __future__ import annotations

from pathlib import Path

import jax
from etils import epath
from ml_collections import ConfigDict

from agrl_jax.data import pipeline
from agrl_jax.evaluation import probabilities, tables
from agrl_jax.evaluation.metrics import ScorecardError
from agrl_jax.judging import cuts, trained
from agrl_jax.judging.cuts import CutsError
from agrl_jax.policy import huggingface
from agrl_jax.policy.transformer import count_parameters
from agrl_jax.rulebook import grammar, wording
from agrl_jax.rulebook.book import RuleBook
from agrl_jax.runtime import sharding
from agrl_jax.runtime.config import resolve
from agrl_jax.runtime.files import write_json, write_text
from agrl_jax.training import assemble
from agrl_jax.types import Params

RULEBOOK_FILE = "rulebook.yaml"
EBNF_FILE, REGEX_FILE = "grammar.ebnf", "grammar.regex"
USER_ERRORS = (*trained.LOAD_ERRORS, ScorecardError)  # shown as one message


def export(workdir: str, out: str, stage: str = "best", dtype: str | None = None) -> str:
    """Writes the policy of a workdir to the folder `out`, which should be empty or not there.

    Args:
      workdir: of a training run.
      out: the folder.
      stage: `best` of RL by validation, `rl` (its latest) or `sft_end`.
      dtype: of the weights; by default as trained.

    Returns:
      In words, what was exported.
    """
    folder, target = epath.Path(workdir), Path(out)
    huggingface.check_empty(target)  # before the weights are read
    config = assemble.read_config(folder)
    mesh = sharding.make_mesh(data=1, fsdp=-1)  # spread out: nothing is computed
    model = assemble.load_model(config, folder, mesh=mesh)
    params, found = trained.load_stage(folder, config, model, mesh, stage)
    where = str(found)
    dtype = dtype or config.policy.param_dtype
    record = {
        "rulebook": RULEBOOK_FILE,
        "rulebook_digest": model.book.digest,
        "order": model.book.order,
        "style": config.data.style,
        "prompt_len": config.data.prompt_len,
        "response_len": config.data.response_len,
        "dtype": dtype,
        "compute_dtype": config.policy.compute_dtype,
        "stage": where,
        "config": resolve(config),
    }
    huggingface.save_pretrained(
        target, model.shape, params, model.tokenizer, dtype=dtype,
        generation_config={"max_new_tokens": config.data.response_len},
        card=_card(target.name, folder, config, model, count_parameters(params), where),
    )  # fmt: skip
    (target / RULEBOOK_FILE).write_bytes(assemble.rules_file(config, folder).read_bytes())
    _write_grammar(target, model.book)
    if dtype == config.policy.param_dtype:
        _copy_cuts(folder, target, model.book, params)
    _copy_calibration(folder, target, model.book, where, jax.tree.map(lambda x: x.astype(dtype), params))
    write_json(target / trained.RECORD_FILE, record)
    return f"{where} of {workdir}, {count_parameters(params):,} parameters in {dtype}"


def _write_grammar(target: Path, rules: RuleBook) -> None:
    """Writes what other engines decode under; no regular expression where that would be too long."""
    write_text(target / EBNF_FILE, grammar.ebnf(rules))
    try:
        write_text(target / REGEX_FILE, grammar.regex(rules))
    except grammar.GrammarError:
        pass


def _copy_cuts(folder: epath.Path, target: Path, rules: RuleBook, params: Params) -> None:
    """Takes cut points along that were fitted for these parameters."""
    file = folder / trained.CUTS_FILE
    try:
        cuts.load(file, [tier.name for tier in rules.tiers], trained.identity(rules, params))
    except CutsError:
        return
    (target / trained.CUTS_FILE).write_bytes(file.read_bytes())


def _copy_calibration(folder: epath.Path, target: Path, rules: RuleBook, where: str, params: Params) -> None:
    """Takes the temperature along that was fitted for a checkpoint, here by the fingerprint of what is exported."""
    fitted = probabilities.load(folder / probabilities.FILE, where, rules)
    if fitted is not None:
        probabilities.keep(target / probabilities.FILE, trained.fingerprint(params), fitted, rules)


# ---------------------------------------------------------------------------------------------- the card


def _card(
    name: str, folder: epath.Path, config: ConfigDict, model: assemble.Model, size: int, where: str
) -> str:
    """README.md: what the model is, how it is asked, what it was trained on, and how well it does."""
    rules = model.book
    sections = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n"
        "tags:\n- agrl_jax\n- search-relevance\n- e-commerce\n---",
        f"# {name}",
        f"A judge of search relevance with {size:,} parameters. Given a shopper's query and an item, it reasons in "
        f"{len(rules.steps)} checkable steps and ends in one of {len(rules.tiers)} tiers, by the rule book "
        f"`{RULEBOOK_FILE}`.",
        _use(config, model),
        _rules(rules),
        _training(config, where),
    ]
    if (folder / "scorecard.json").exists():
        cards = tables.read(folder / "scorecard.json")
        sections.append(f"## Scorecard\n\nOf the end of each stage; exported is {where}.")
        sections.append(tables.to_markdown(cards).strip())
    return "\n\n".join(sections) + "\n"


def _use(config: ConfigDict, model: assemble.Model) -> str:
    rules = model.book
    pieces = pipeline.prompt_pieces(rules, model.tokenizer, config.data.style)
    prompt = "QUERY".join(pieces[:2]) + "TITLE | brand: BRAND" + pieces[2]
    return f"""## Use

With `agrl_jax`, which lets it take only tokens that lead to a well-formed answer:

    python -m agrl_jax.judge --checkpoint=FOLDER --input=pairs.csv --output=judged.csv

With `transformers` or any server of such folders, greedily, on this prompt:

{_fenced(prompt)}

Servers that decode under a grammar then write well-formed answers only: `{EBNF_FILE}` holds all of them as EBNF, which
is vLLM's `structured_outputs={{"grammar": ...}}` and SGLang's `ebnf`, and `{REGEX_FILE}` as a regular expression, there
`regex`. With free text in the rule book, the regular expression may be missing for its length.

An answer looks like this:

{_fenced("".join(_example(rules)))}"""


def _example(rules: RuleBook) -> list[str]:
    """A response that follows the rules: the first value of every step."""
    steps = (0,) * len(rules.steps)
    return wording.gold_segments(rules, rules.tier_for(steps), steps)


def _fenced(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}\n{text}\n{fence}"


def _rules(rules: RuleBook) -> str:
    lines = ["## Rule book", f"`{rules.name}`, order `{rules.order}`. Steps:"]
    lines.append("\n".join(f"- **{step.name}**: {step.question} ({', '.join(step.values)})" for step in rules.steps))
    lines.append("Tiers, best first: " + ", ".join(tier.name for tier in rules.tiers) + ".")
    return "\n\n".join(lines)


def _training(config: ConfigDict, where: str) -> str:
    data = "the bundled benchmark" if config.data.source == "benchmark" else f"`{Path(config.data.path).name}`"
    stages = f"{config.sft.steps} supervised steps"
    if config.rl.steps:
        stages += (
            f", then {config.rl.steps} steps of reinforcement learning (method `{config.method}`) "
            f"on {config.rl.batch_size} examples with {config.rl.group_size} answers each"
        )
    return (
        f"## Training\n\nBy agrl_jax, on {data} (seed {config.data.seed}): {stages}. This is {where}. "
        f"All fields of the run are in `{trained.RECORD_FILE}`."
    )
