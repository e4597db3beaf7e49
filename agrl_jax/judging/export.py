"""A trained judge as a folder with rule book, settings and model card; see `agrl_jax.export`.

The folder is one of Hugging Face's, or holds adapters alone for a model that lies elsewhere.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from agrl_jax.data import pipeline
from agrl_jax.evaluation import probabilities, tables
from agrl_jax.evaluation.metrics import ScorecardError
from agrl_jax.evaluation.probabilities import Calibration
from agrl_jax.judging import cuts, trained
from agrl_jax.judging.cuts import CutsError
from agrl_jax.judging.trained import TrainedError
from agrl_jax.policy import adapters, huggingface, loading, shipped
from agrl_jax.policy.adapters import Adapters
from agrl_jax.policy.transformer import count_parameters
from agrl_jax.rulebook import grammar, wording
from agrl_jax.rulebook.book import RuleBook
from agrl_jax.runtime import sharding
from agrl_jax.runtime.checkpoint import SFT_END
from agrl_jax.runtime.config import ConfigError, resolve
from agrl_jax.runtime.files import OutputError, check_bucket, is_remote, read_json, write_json, write_text
from agrl_jax.training import assemble
from agrl_jax.training.assemble import Model
from agrl_jax.types import Params

RULEBOOK_FILE, CARD_FILE = "rulebook.yaml", "README.md"
EBNF_FILE, REGEX_FILE = "grammar.ebnf", "grammar.regex"
USER_ERRORS = (*trained.LOAD_ERRORS, ScorecardError, OutputError)  # shown as one message


def export(workdir: str, out: str, stage: str = "best", dtype: str | None = None, adapters_alone: bool = False) -> str:
    """Writes the policy of a workdir to the folder `out`, which should be empty or not there.

    Args:
      workdir: the folder of a training run.
      out: the folder to write.
      stage: `best` of RL by validation, `rl` (its latest) or `sft_end`.
      dtype: of the weights; by default as trained.
      adapters_alone: writes only the low-rank adapters that were trained, and the name of their base model.

    Returns:
      What was exported, in words.
    """
    check_bucket(workdir)
    folder, target = epath.Path(workdir), _target(out)  # before the weights are read
    config = assemble.read_config(folder)
    mesh = sharding.make_mesh(data=1, fsdp=-1)  # spread out: nothing is computed
    model = assemble.load_model(config, folder, mesh=mesh)
    dtype = dtype or config.policy.param_dtype
    if adapters_alone:
        return _export_adapters(folder, target, config, model, mesh, stage, dtype)
    params, found = trained.load_stage(folder, config, model, mesh, stage)
    where, name = str(found), _fingerprint_in(params, dtype)
    with _whole(target) as half:
        huggingface.save_pretrained(
            half, model.shape, params, model.tokenizer, dtype=dtype,
            generation_config={"max_new_tokens": config.data.response_len},
            card=_card(target.name, folder, config, model, count_parameters(params), where),
        )  # fmt: skip
        if dtype == config.policy.param_dtype:
            _copy_cuts(folder, half, model.book, trained.weights_name(folder, config, model, mesh, found, params), name)
        _write_record(folder, half, config, model, dtype, where, name)
    return f"{where} of {workdir}, {count_parameters(params):,} parameters in {dtype}"


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A folder to write in the block; at its end it becomes `target`. After an error nothing is left.

    Without the files that are written last, a folder would be read as another model, with another rule book.
    """
    half = target.with_name(f"{target.name}.half")
    shutil.rmtree(half, ignore_errors=True)
    try:
        yield half
        half.rename(target)
    finally:
        shutil.rmtree(half, ignore_errors=True)


def _target(out: str) -> Path:
    """The folder to write: a local one, empty or not there."""
    if is_remote(out):
        raise ConfigError(f"--out={out}: should be a local folder; copy it to the bucket afterwards")
    target = Path(out).resolve()
    huggingface.check_empty(target)
    return target


def _export_adapters(
    folder: epath.Path, target: Path, config: ConfigDict, model: Model, mesh: jax.sharding.Mesh, stage: str, dtype: str
) -> str:
    """Writes the adapters of a workdir; their base is the pretrained model that its config names."""
    cfg = assemble.adapters_of(config, SFT_END)
    if cfg is None:
        raise ConfigError(f"{folder}: its warm start trained all weights: adapters alone are not what was learnt")
    found = trained.find_stage(folder, config, model.book, stage)
    params = assemble.load_trained(folder, config, model, mesh, *found)
    learnt = Adapters(config.policy.pretrained, config.lora.base_dtype, cfg, jax.device_get(params))
    card = _card(target.name, folder, config, model, count_parameters(params), str(found))
    with _whole(target) as half:
        half.mkdir(parents=True)
        adapters.save(half, learnt, dtype)
        model.tokenizer.save(half)  # it says where answers end, and whether the model thinks
        write_text(half / CARD_FILE, card)
        _write_record(folder, half, config, model, config.policy.param_dtype, str(found), adapters.digest(half))
    return f"{found} of {folder}, adapters of {count_parameters(params):,} parameters in {dtype}"


def export_model(checkpoint: str, out: str, dtype: str | None = None) -> str:
    """Writes a judge that is not a workdir, such as the one in the box, as a Hugging Face folder, `out`.

    What lies beside the judge's weights is exported too. Returns what was exported, in words.

    Raises:
      TrainedError: the checkpoint is not what `export` has written.
      ConfigError: it is in a bucket.
    """
    if is_remote(checkpoint):
        raise ConfigError(f"--checkpoint={checkpoint}: should be a local folder; copy it from the bucket first")
    target, where = _target(out), shipped.find(checkpoint)
    file = where / trained.RECORD_FILE
    if not file.exists():
        raise TrainedError(f"{checkpoint}: has no {trained.RECORD_FILE}, so it is no export; a run goes by --workdir")
    loaded, record = trained.load(checkpoint), read_json(file, TrainedError)
    dtype = dtype or record["dtype"]
    name = _fingerprint_in(loaded.params, dtype)
    fitted = probabilities.load(loaded.calibration_file, loaded.checkpoint, loaded.book)
    with _whole(target) as half:
        huggingface.save_pretrained(
            half, loading.read_config(where), loaded.params, loaded.tokenizer, dtype=dtype,
            generation_config={"max_new_tokens": loaded.response_len},
            card=(where / CARD_FILE).read_text() if (where / CARD_FILE).exists() else None,
        )  # fmt: skip
        if dtype == record["dtype"]:
            _copy_cuts(where, half, loaded.book, loaded.weights, name)
        _write_beside(half, where / RULEBOOK_FILE, loaded.book, fitted, name, record | {"dtype": dtype})
    return f"{checkpoint}, {count_parameters(loaded.params):,} parameters in {dtype}"


def _write_record(
    folder: epath.Path, target: Path, config: ConfigDict, model: Model, dtype: str, where: str, name: str
) -> None:
    """Writes what lies beside the weights of a run; the calibration calls the checkpoint `name`."""
    record = {
        "rulebook": RULEBOOK_FILE,
        "rulebook_digest": model.book.digest,
        "order": model.book.order,
        "free_text": model.book.response.free_text,
        "style": config.data.style,
        "prompt_len": config.data.prompt_len,
        "response_len": config.data.response_len,
        "dtype": dtype,
        "compute_dtype": config.policy.compute_dtype,
        "stage": where,
        "config": resolve(config),
    }
    fitted = probabilities.load(folder / probabilities.FILE, where, model.book)
    _write_beside(target, assemble.rules_file(config, folder), model.book, fitted, name, record)


def _write_beside(
    target: Path, rules_file: epath.PathLike, rules: RuleBook, fitted: Calibration | None, name: str,
    record: Mapping[str, Any],
) -> None:
    """Writes the rule book and its grammar, the temperature under the checkpoint's `name`, and the record."""
    (target / RULEBOOK_FILE).write_bytes(epath.Path(rules_file).read_bytes())
    _write_grammar(target, rules)
    if fitted is not None:
        probabilities.keep(target / probabilities.FILE, name, fitted, rules)
    write_json(target / trained.RECORD_FILE, record)


def _fingerprint_in(params: Params, dtype: str) -> str:
    """The fingerprint of parameters that are written in a dtype."""
    return trained.fingerprint(jax.tree.map(lambda x: x.astype(dtype), params))


def _write_grammar(target: Path, rules: RuleBook) -> None:
    """Writes the grammar for other engines; no regular expression where that would be too long."""
    write_text(target / EBNF_FILE, grammar.ebnf(rules))
    try:
        write_text(target / REGEX_FILE, grammar.regex(rules))
    except grammar.GrammarError:
        pass


def _copy_cuts(folder: epath.Path, target: Path, rules: RuleBook, weights: str, name: str) -> None:
    """Copies cut points that were fitted for these weights, which have another name where they are exported."""
    file = folder / trained.CUTS_FILE
    try:
        cuts.load(file, [tier.name for tier in rules.tiers], trained.identity(rules, weights))
    except CutsError:
        return
    content = json.loads(file.read_text())
    write_json(target / trained.CUTS_FILE, content | {"made_for": content["made_for"] | trained.identity(rules, name)})


# ---------------------------------------------------------------------------------------------- the card


def _card(
    name: str, folder: epath.Path, config: ConfigDict, model: Model, size: int, where: str
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


def _use(config: ConfigDict, model: Model) -> str:
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
    if config.method == "distill":
        teacher = f", from the weights of `{Path(config.distill.teacher).name}`" if config.distill.teacher else ""
        stages += f", then {config.distill.steps} steps of distillation of a judge that reasons first{teacher}"
    elif config.rl.steps:
        stages += (
            f", then {config.rl.steps} steps of reinforcement learning (method `{config.method}`) "
            f"on {config.rl.batch_size} examples with {config.rl.group_size} answers each"
        )
    return (
        f"## Training\n\nBy agrl_jax, on {data} (seed {config.data.seed}): {stages}. This is {where}. "
        f"All fields of the run are in `{trained.RECORD_FILE}`."
    )
