"""An exported judge: the same judgements as the workdir's, and a folder that `transformers` loads as it is."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from workdirs import make_workdir

from agrl_jax import evaluate, recipes
from agrl_jax.evaluation import probabilities, tables
from agrl_jax.evaluation.probabilities import Calibration
from agrl_jax.judging import cuts, trained
from agrl_jax.judging.cuts import Fit
from agrl_jax.judging.engine import Judge
from agrl_jax.judging.export import export, export_model
from agrl_jax.judging.trained import TrainedError
from agrl_jax.policy import shipped
from agrl_jax.policy.families import LoadingError
from agrl_jax.rulebook import book, grammar
from agrl_jax.runtime.config import ConfigError
from agrl_jax.runtime.files import OutputError
from agrl_jax.training import run

ROWS = [
    {"query": "red shoes", "title": "Nike running shoes, red"},
    {"query": "schuhe für Kinder 👟", "title": "x " * 100, "brand": "Nike"},
    {"query": "boots", "title": ""},
]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir of a policy that was trained with a user's own rule book, tier first."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "mine.yaml").write_text(book.file_of("four_tier").read_text().replace("partly met", "half met"))
    (folder / "run").mkdir()
    make_workdir(folder / "run", path=str(folder / "mine.yaml"), order="respond_then_think")
    measure = {"value": 0.625, "low": 0.5, "high": 0.75, "n": 40}
    tables.write(folder / "run" / "scorecard.json", {"agrl": {"b_eval": {"accuracy": measure}}})
    return folder / "run"


@pytest.fixture(scope="module")
def exported(workdir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "my_judge"
    said = export(str(workdir), str(folder))
    assert said.startswith("step 3 of RL of ")
    return folder


@pytest.mark.slow
def test_the_export_judges_as_the_workdir_does(workdir: Path, exported: Path) -> None:
    ours = Judge.from_checkpoint(str(workdir), batch_size=2)
    theirs = Judge.from_checkpoint(str(exported), batch_size=2)
    assert theirs.identity == ours.identity
    judged = theirs.judge(ROWS)
    assert judged == ours.judge(ROWS)
    assert judged[0].response.startswith("Tier: ") and judged[2].error == "title is empty"


def test_an_export_in_a_bucket_judges_alike(exported: Path, bucket: str) -> None:
    folder = epath.Path(f"{bucket}/my_judge")
    folder.mkdir(parents=True)
    for file in exported.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    theirs = Judge.from_checkpoint(str(folder), batch_size=2)
    assert theirs.identity == Judge.from_checkpoint(str(exported), batch_size=2).identity
    cuts.save(theirs._loaded.cuts_file, [tier.name for tier in theirs.book.tiers], Fit((0.2, 0.4, 0.6), 0.9, 0.8), {})
    assert (folder / "cuts.json").exists()


def test_the_folder_says_what_it_is(workdir: Path, exported: Path) -> None:
    names = {file.name for file in exported.iterdir()}
    assert names == {
        "README.md", "agrl_jax.json", "config.json", "generation_config.json", "grammar.ebnf", "grammar.regex",
        "model.safetensors", "rulebook.yaml", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    record = json.loads((exported / "agrl_jax.json").read_text())
    assert record["order"] == "respond_then_think" and record["stage"] == "step 3 of RL"
    assert record["config"] == json.loads((workdir / "config.json").read_text())
    assert (exported / "rulebook.yaml").read_text() == (workdir.parent / "mine.yaml").read_text()
    rules = book.load(exported / "rulebook.yaml", "respond_then_think")
    assert (exported / "grammar.ebnf").read_text() == grammar.ebnf(rules)
    assert (exported / "grammar.regex").read_text() == grammar.regex(rules)
    generation = json.loads((exported / "generation_config.json").read_text())
    assert (generation["do_sample"], generation["max_new_tokens"]) == (False, record["response_len"])
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "# my_judge" in card
    for said in ("| accuracy |", "0.625", "the bundled benchmark", "method `agrl`", "step 3 of RL", "half met"):
        assert said in card
    assert "Item: TITLE | brand: BRAND" in card and "Tier: 4-Excellent\nCategory: same\nBrand: match" in card


def test_transformers_loads_it_with_the_same_logits_and_tokens(workdir: Path, exported: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    loaded = trained.load(str(workdir))
    text = "Query: red shoes 42\nItem: Nike — running <|end|>\n"
    tokens = loaded.tokenizer.encode(text, parse_special=True)
    assert tokenizer(text)["input_ids"] == tokens
    assert tokenizer.decode(tokens) == text
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == loaded.tokenizer.end_token
    batch = np.array([[tokens]])
    ours = jax.jit(lambda: loaded.policy.unembed(loaded.params, loaded.policy.apply(loaded.params, batch)[0][0, 0]))()
    with torch.no_grad():
        theirs = model(torch.tensor([tokens])).logits[0].numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_transformers_judges_a_batch_as_it_judges_one_by_one(exported: Path) -> None:
    """Two padded prompts of different lengths. The model takes the whole output of the tokenizer."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    texts = ["Query: red shoes\nItem: Nike\n", "Query: a\nItem: Nike running shoes, red\n"]
    pipe = transformers.pipeline("text-generation", model=str(exported), batch_size=2)
    together = [out[0]["generated_text"] for out in pipe(texts, max_new_tokens=12)]
    assert together == [pipe(text, max_new_tokens=12)[0]["generated_text"] for text in texts]
    assert set(pipe.tokenizer("a")) == {"input_ids", "attention_mask"}
    settings = json.loads((exported / "tokenizer_config.json").read_text())
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]  # otherwise version 4 adds token_type_ids


def test_a_chat_template_goes_along(workdir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    copy.mkdir()
    for file in workdir.iterdir():
        (copy / file.name).symlink_to(file)
    (copy / "tokenizer_config.json").unlink()
    config = json.loads((workdir / "tokenizer_config.json").read_text()) | {"chat_template": "{{ messages }}"}
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    export(str(copy), str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["chat_template"] == "{{ messages }}"


def test_cut_points_of_the_same_parameters_go_along(workdir: Path, tmp_path: Path) -> None:
    loaded = trained.load(str(workdir))
    tiers = [tier.name for tier in loaded.book.tiers]
    made_for = trained.identity(loaded.book, loaded.weights) | {"temperature": "1.0"}
    cuts.save(loaded.cuts_file, tiers, Fit((0.2, 0.4, 0.6), 0.9, 0.8), made_for)
    export(str(workdir), str(tmp_path / "best"))
    export(str(workdir), str(tmp_path / "other"), stage="sft_end")
    (workdir / "cuts.json").unlink()
    using = Judge.from_checkpoint(str(tmp_path / "best"), batch_size=2, use_cuts=True)
    assert using.identity["cuts"] == [0.2, 0.4, 0.6]
    export_model(str(tmp_path / "best"), str(tmp_path / "again"))
    assert Judge.from_checkpoint(str(tmp_path / "again"), batch_size=2, use_cuts=True).identity == using.identity
    assert not (tmp_path / "other" / "cuts.json").exists()


def test_an_export_that_fails_leaves_no_folder_that_would_load_as_another_judge(workdir: Path, tmp_path: Path) -> None:
    (workdir / "calibration.json").write_text("{")
    with pytest.raises(probabilities.CalibrationError):
        export(str(workdir), str(tmp_path / "out"))
    (workdir / "calibration.json").unlink()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_temperature_goes_along(workdir: Path, tmp_path: Path, dtype: str) -> None:
    rules = trained.load(str(workdir)).book
    fitted = Calibration(2.5, "probabilities", 256, 0.9, 5.0, 0.58, 0.6)
    probabilities.keep(workdir / "calibration.json", "step 3 of RL", fitted, rules)
    export(str(workdir), str(tmp_path / "best"), dtype=dtype)
    export(str(workdir), str(tmp_path / "other"), stage="sft_end")
    (workdir / "calibration.json").unlink()
    assert Judge.from_checkpoint(str(tmp_path / "best"), batch_size=2).calibration == fitted
    assert Judge.from_checkpoint(str(tmp_path / "other"), batch_size=2).calibration is None


def test_weights_in_half_precision(workdir: Path, exported: Path, tmp_path: Path) -> None:
    export(str(workdir), str(tmp_path / "half"), dtype="bfloat16")
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (exported, tmp_path / "half")]
    assert sizes[1] < 0.55 * sizes[0]
    assert trained.load(str(tmp_path / "half")).params["embedding"].dtype == "bfloat16"


def test_a_rule_book_of_a_relative_path_and_its_free_text_go_along_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    (home / "run").mkdir(parents=True)
    monkeypatch.chdir(home)
    rules = book.file_of("four_tier").read_text()
    Path("rules.yaml").write_text(rules)
    make_workdir(home / "run", path="rules.yaml", free_text="between")
    Path("rules.yaml").write_text(rules + "# changed since\n")
    monkeypatch.chdir(tmp_path)
    export("home/run", "exported")
    assert (tmp_path / "exported" / "rulebook.yaml").read_text() == rules
    judges = [Judge.from_checkpoint(folder, batch_size=4) for folder in ("home/run", "exported")]
    assert judges[0].identity == judges[1].identity
    assert {judge.book.response.free_text for judge in judges} == {"between"}


def test_what_cannot_be_exported_is_refused(workdir: Path, exported: Path, tmp_path: Path) -> None:
    for write in (partial(export, str(workdir)), partial(export_model, str(exported))):
        with pytest.raises(ConfigError, match="--out=gs://bucket/out: should be a local folder; copy it to the bucket"):
            write("gs://bucket/out")
    with pytest.raises(ConfigError, match="--checkpoint=gs://bucket/mine: should be a local folder"):
        export_model("gs://bucket/mine", str(tmp_path / "out"))
    with pytest.raises(LoadingError, match="should be an empty folder"):
        export(str(workdir), str(exported))
    with pytest.raises(ConfigError, match="is .* the workdir of a training run"):
        export(str(tmp_path), str(tmp_path / "out"))
    with pytest.raises(TrainedError, match="'last' is not one of"):
        export(str(workdir), str(tmp_path / "out"), stage="last")
    assert not (tmp_path / "out").exists()


def test_a_bucket_that_cannot_be_read_is_refused_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(epath.backend.fsspec_backend, "_get_filesystem", missing)
    for command in (lambda path: export(path, str(tmp_path / "out")), lambda path: evaluate.evaluate(path, [], [], 0),
                    lambda path: run.train(recipes.base(), path)):  # fmt: skip
        with pytest.raises(OutputError, match="gs://bucket/run: Please install gcsfs"):
            command("gs://bucket/run")


def test_paths_of_models_begin_at_home_and_end_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    with pytest.raises(TrainedError, match="~/model: should be a training run's workdir"):  # it is found
        trained.load("~/model")
    with pytest.raises(LoadingError, match="gs://bucket/m: should be a local folder or file"):
        shipped.find("gs://bucket/m")


def test_a_record_that_is_not_ours_is_refused(exported: Path, tmp_path: Path) -> None:
    for file in exported.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "agrl_jax.json").unlink()
    (tmp_path / "agrl_jax.json").write_text('{"order": "respond_then_think"}')
    with pytest.raises(TrainedError, match=r"agrl_jax\.json: not the record of an export"):
        trained.load(str(tmp_path))
    (tmp_path / "agrl_jax.json").unlink()
    assert trained.load(str(tmp_path)).style == "full"  # without a record, it is like any other language model


def test_a_rule_book_changed_in_the_export_is_refused(exported: Path, tmp_path: Path) -> None:
    for file in exported.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "rulebook.yaml").unlink()
    (tmp_path / "rulebook.yaml").write_text((exported / "rulebook.yaml").read_text().replace("half met", "partly met"))
    with pytest.raises(TrainedError, match="trained with another rule book"):
        trained.load(str(tmp_path))
