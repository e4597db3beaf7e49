"""Configs: the string argument, the rules of the fields, resolving and comparing, the command line."""

import json
import re
import sys

import pytest
from absl import flags
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict, config_flags

from agrl_jax import recipes
from agrl_jax import types as schema
from agrl_jax.runtime import config as cfg
from agrl_jax.runtime.config import ConfigError, Rule
from configs import dyknow_rag

# ------------------------------------------------------------------------- the argument of a config file

SPEC = {"variant": ("agrl", "grpo", "rrs"), "batch": 4, "rate": 0.5, "name": "x", "local": False}


def test_parse_arg_defaults():
    expected = {"variant": "agrl", "batch": 4, "rate": 0.5, "name": "x", "local": False}
    assert cfg.parse_arg(None, **SPEC).to_dict() == expected
    assert cfg.parse_arg("", **SPEC).to_dict() == expected


@pytest.mark.parametrize("arg", ["grpo,batch=8,rate=2,local", "variant=grpo, batch=8, rate=2.0, local=true"])
def test_parse_arg_takes_types_from_the_defaults(arg):
    parsed = cfg.parse_arg(arg, **SPEC)
    assert parsed.to_dict() == {"variant": "grpo", "batch": 8, "rate": 2.0, "name": "x", "local": True}
    assert isinstance(parsed.rate, float)


def test_parse_arg_first_bare_word_may_be_a_boolean():
    assert cfg.parse_arg("local", **SPEC).local is True
    assert cfg.parse_arg("local", local=False).local is True


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("bach=8", "unknown name 'bach'; did you mean 'batch'?"),
        ("grop", "variant=grop: not one of agrl, grpo, rrs; did you mean 'grpo'"),
        ("batch=many", "batch=many: expected int"),
        ("batch=1.5", "batch=1.5: expected int"),
        ("local=perhaps", "local=perhaps: expected true or false"),
        ("grpo,rrs", "unknown name 'rrs'"),
        ("grpo,batch", "batch needs a value, as in batch=4"),
        ("batch=1,batch=2", "batch is given twice"),
    ],
)
def test_parse_arg_refuses(arg, message):
    with pytest.raises(ConfigError) as error:
        cfg.parse_arg(arg, **SPEC)
    assert message in str(error.value)


@given(batch=st.integers(), rate=st.floats(allow_nan=False), name=st.text("abc=", max_size=5), local=st.booleans())
@settings(max_examples=50)
def test_parse_arg_reads_back_what_was_written(batch, rate, name, local):
    parsed = cfg.parse_arg(f"batch={batch},rate={rate!r},name={name},local={local}", **SPEC)
    assert (parsed.batch, parsed.rate, parsed.name, parsed.local) == (batch, rate, name, local)


# ------------------------------------------------------------------------------- the rules of the fields


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        (Rule(int, low=2, high=4), [2, 4], [1, 5, 2.0, True, "2", None]),
        (Rule(above=0, high=10), [10, 1e-9, 3], [0, -1, 10.1, float("nan"), float("inf"), False, "1"]),
        (Rule(int, low=1, also=(-1,)), [-1, 1, 7], [0, -2, -1.0]),
        (Rule(str, choices=("a", "b")), ["a"], ["c", "", 1, None]),
        (Rule(bool), [True, False], [0, 1, "True", None]),
        (Rule(str), ["", "x"], [1, None]),
    ],
)
def test_rule(rule, good, bad):
    assert [rule.problem(value) for value in good] == [""] * len(good)
    assert all(rule.problem(value) for value in bad)


def test_rule_says_what_would_be_right():
    assert Rule(int, low=2).problem(1) == "is 1, expected a whole number >= 2"
    assert Rule(above=0, high=10).problem(0) == "is 0, expected a number > 0 and <= 10"
    assert Rule(int, low=1, also=(-1,)).problem(0) == "is 0, expected a whole number >= 1 or -1"
    choices = Rule(str, choices=("grpo", "dapo", "rloo"))
    assert choices.problem("grop") == "is 'grop', expected one of grpo, dapo, rloo; did you mean 'grpo'?"


def test_the_default_config_obeys_the_rules_and_has_no_field_without_one():
    config = recipes.base()
    cfg.validate(config)
    cfg.validate_together(config, data_shards=1)
    assert set(cfg.flatten(config)) == set(cfg.RULES)


@pytest.mark.parametrize("name", sorted(cfg.RULES))
def test_each_field_is_checked(name):
    config = recipes.base()
    with config.unlocked(), config.ignore_type():
        config.update_from_flattened_dict({name: ["neither number nor text"]})
    with pytest.raises(ConfigError, match=f"^config: {name} is "):
        cfg.validate(config)


def test_choices_may_be_joined_where_several_act_together():
    rule = cfg.RULES["sft.source"]
    assert rule.problem("train") == rule.problem("benchmark_train+pairs") == ""
    assert "or several joined by +; did you mean 'train'?" in rule.problem("benchmark+trian")
    assert "names a part twice" in rule.problem("train+train")
    assert "expected one of" in rule.problem("train+") and "expected one of" in rule.problem("")
    assert "expected one of" in cfg.RULES["data.source"].problem("pairs+esci")


def test_all_problems_come_in_one_message():
    config = recipes.base()
    config.rl.group_size = 1
    config.objective.loss = "gropo"
    config.guidance.threshold = 1.5
    del config.sft
    with pytest.raises(ConfigError) as error:
        cfg.validate(config)
    lines = str(error.value).splitlines()
    assert lines[0] == f"config: {3 + len(recipes.base().sft)} problems"  # these three, and the fields of sft
    assert "  rl.group_size is 1, expected a whole number >= 2" in lines
    assert "  guidance.threshold is 1.5, expected a number >= 0 and <= 1" in lines
    assert "  field sft.warmup is missing" in lines
    assert any(line.startswith("  objective.loss is 'gropo'") and "did you mean 'grpo'" in line for line in lines)


def test_a_field_that_a_config_file_misspells_is_refused():
    config = recipes.base()
    with config.unlocked():
        config.rl.stpes = 3
    with pytest.raises(ConfigError, match="unknown field rl.stpes; did you mean 'rl.steps'"):
        cfg.validate(config)


# ----------------------------------------------------------------------------------- fields in agreement


@pytest.mark.parametrize(
    ("changes", "shards", "message"),
    [
        ({"rl.batch_size": 30, "rl.minibatches": 2}, 4,
         "rl.batch_size=30 cannot be split into 4 data shards x rl.minibatches=2 x rl.micro_batches=1 equal pieces; "
         "nearest: 24 or 32"),
        ({"rl.batch_size": 4, "rl.micro_batches": 2, "rl.minibatches": 3}, 1, "equal pieces; nearest: 6"),
        ({"sft.batch_size": 30}, 4, "sft.batch_size=30 cannot be split over 4 data shards; nearest: 28 or 32"),
        ({"sft.batch_size": 32, "sft.micro_batches": 3}, 4,
         "sft.batch_size=32 cannot be split over 4 data shards x sft.micro_batches=3 equal pieces; nearest: 24 or 36"),
        ({"rl.sample_batches": 3}, 4, "x rl.sample_batches=3 equal pieces; nearest: 60 or 72"),
        ({"rl.batch_size": 32, "guidance.capacity": 0.2}, 8,
         "guidance.capacity=0.2 of 4 examples per data shard is less than one group; use at least 0.25, or "
         "guidance.enabled=False"),
        ({"rl.group_size": 8, "guidance.replace": 9}, 1, "guidance.replace=9 is more than rl.group_size=8"),
        ({"rulebook.order": "respond_then_think", "guidance.treatment": "mask"}, 1, "the tier would be forced"),
        ({"rl.candidates": 2}, 1, "rl.candidates=2 with guidance.enabled=True: groups are either refilled or guided"),
        ({"difficulty.pool": 2, "rl.candidates": 2, "guidance.enabled": False}, 1,
         "difficulty.pool=2 with rl.candidates=2: examples are chosen either before they are rolled or after"),
        ({"difficulty.pool": 2, "difficulty.low": 0.9, "difficulty.high": 0.1}, 1,
         "difficulty.low=0.9 and difficulty.high=0.1: no pass rate lies in this band"),
        ({"difficulty.pool": 2, "difficulty.low": 0.0, "difficulty.high": 1.0}, 1,
         "difficulty.low=0.0 and difficulty.high=1.0: every pass rate lies in this band"),
        ({"reward.tier_kind": "rps", "rl.group_size": 2}, 1,
         "reward.tier_kind=rps with rl.group_size=2: each answer is compared with at least two others; use at least 3"),
        ({"reward.tier_kind": "brier", "guidance.replace": 3}, 1,
         "reward.tier_kind=brier with guidance.replace=3 of rl.group_size=4: guided answers are compared with guided"),
        ({"method": "dpo", "dpo.batch_size": 30}, 4, "dpo.batch_size=30 cannot be split over 4 data shards"),
        ({"policy.heads": 3}, 1, "policy.kv_heads=2 must divide policy.heads=3"),
        ({"policy.head_dim": 7}, 1, "policy.head_dim=7 must be even"),
        ({"policy.thinking": "on", "data.response_len": 300}, 1, "template: data.style is terse, not chat"),
        ({"policy.thinking": "on", "policy.pretrained": "x", "data.style": "chat"}, 1,
         "policy.thought_len=256 leaves no room for an answer in data.response_len=17"),
        ({"data.source": "pairs"}, 1, "data.source=pairs needs data.path, a CSV"),
        ({"data.source": "wands"}, 1, "data.source=wands needs data.path, the folder"),
        ({"sft.source": "train+pairs"}, 1, "needs sft.path, a CSV"),
        ({"sft.source": "esci+wands", "sft.path": "x"}, 1, "sft.path is one of esci and wands, not both"),
        ({"sft.source": "both+pairs", "sft.path": "x"}, 1, "both is benchmark+train; name what is meant"),
        ({"sft.source": "train+benchmark_train"}, 1, "train and benchmark_train are the same pairs"),
        ({"sft.source": "known+train"}, 1, "sft.source=known+train: the pairs of known are among those of train"),
        ({"data.response_len": 16}, 1, "reward.overlong_from=16 must be below data.response_len=16"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(changes, shards, message):
    config = recipes.base()
    config.update_from_flattened_dict(changes)
    cfg.validate(config)
    with pytest.raises(ConfigError) as error:
        cfg.validate_together(config, shards)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def changed(**fields):
    config = recipes.base()
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


@pytest.mark.parametrize("method", recipes.METHODS)
def test_every_method_is_what_its_name_says(method):
    recipes.check(recipes.with_method(recipes.base(), method))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "grpo"}, "method=grpo with guidance.enabled=True, reward.composition=gated, rl.candidates=1: that "
         "is agrl; choose a method by the argument of the config, --config=FILE:grpo, or set method"),
        ({"guidance__enabled": False}, "that is rrs"),
        ({"reward__composition": "terminal"}, "that is agr;"),
        ({"method": "rrs", "guidance__enabled": False, "reward__composition": "sum"}, "that is grpo_pr"),
        ({"method": "grpo", "guidance__enabled": False, "reward__composition": "terminal", "rl__candidates": 2},
         "that is grpo_ds"),
        ({"method": "sft"}, "method=sft with rl.steps=400: it makes no step of RL"),
        ({"method": "sft_all"}, "method=sft_all with more.source=sft: it trains on train"),
        ({"method": "gprc"}, "method is 'gprc', expected one of agrl, rrs"),
    ],
)  # fmt: skip
def test_a_method_that_is_not_that_of_the_fields_is_refused(fields, message):
    with pytest.raises(ConfigError) as error:
        recipes.check(changed(**fields))
    assert message in str(error.value)


def test_the_preset_of_dyknow_rag_changes_what_was_published_and_the_batch_alone():
    config = dyknow_rag.get_config()
    cfg.validate(config)
    cfg.validate_together(config)
    recipes.check(config)
    grpo, fields = cfg.flatten(recipes.with_method(recipes.base(), "grpo")), cfg.flatten(config)
    assert {name: value for name, value in fields.items() if value != grpo[name]} == {
        "rl.group_size": 16, "rl.temperature": 0.99, "objective.kl": "k3", "objective.kl_weight": 0.02,
        "objective.clamp": 2.0, "difficulty.pool": 2, "difficulty.high": 0.9, "rl.batch_size": 16,
    }
    assert config.difficulty.low == 0.01


def test_what_a_method_leaves_open_can_be_chosen():
    recipes.check(changed(reward__composition="sum"))  # AGRL without a gate
    plain = {"guidance__enabled": False, "reward__composition": "terminal"}
    recipes.check(changed(method="grpo_ds", rl__candidates=8, **plain))
    recipes.check(changed(method="dpo", guidance__enabled=False))
    recipes.check(changed(method="sft_more", more__steps=7))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data__path": "a.csv"}, "data.path=a.csv has no effect with data.source=benchmark"),
        ({"difficulty__high": 0.9}, "difficulty.high=0.9 has no effect with difficulty.pool=1"),
        ({"data__labels": "{E: 4}"}, "data.labels={E: 4} has no effect without a file of pairs"),
        ({"data__on_bad_rows": "skip", "data__source": "esci", "data__path": "e"}, "data.on_bad_rows=skip has no eff"),
        ({"data__test_path": "t.csv", "data__source": "wands", "data__path": "w"}, "data.test_path=t.csv has no effec"),
        ({"sft__path": "a.csv", "sft__source": "train"}, "sft.path=a.csv has no effect with sft.source=train"),
        ({"objective__kl_weight": 0.1}, "objective.kl_weight=0.1 has no effect with objective.kl=none"),
        ({"policy__thought_len": 64}, "policy.thought_len=64 has no effect with policy.thinking=off"),
        ({"method": "dpo", "rl__constrained": True}, "rl.constrained=True has no effect with method=dpo"),
        ({"objective__kl": "k3"}, "objective.kl=k3 has no effect with objective.kl_weight=0"),
        ({"objective__loss": "gspo", "objective__clip_low": 0.1}, "objective.clip_low=0.1 has no effect with"),
        ({"objective__gspo_clip_high": 0.1}, "objective.gspo_clip_high=0.1 has no effect with objective.loss=grpo"),
        ({"guidance__baseline": "unguided_only", "guidance__replace": 4}, "guidance.baseline=unguided_only has no"),
        ({"guidance__gamma": 0.2}, "guidance.gamma=0.2 has no effect with guidance.treatment=imitate"),
        ({"guidance__treatment": "mask", "guidance__imitate_weight": 0.2}, "guidance.imitate_weight=0.2 has no"),
        ({"guidance__level": "fixed", "guidance__eta": 0.1}, "guidance.eta=0.1 has no effect with guidance.level"),
        ({"guidance__level": "fixed", "guidance__per_family": False}, "guidance.per_family=False has no effect"),
        ({"method": "agr", "reward__composition": "terminal", "reward__step_weight": 0.5}, "reward.step_weight=0.5"),
    ],
)
def test_changed_fields_without_effect_are_refused_by_name(fields, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        recipes.check(changed(**fields))


def test_fields_that_act_are_fine():
    recipes.check(changed(objective__kl="k1", objective__kl_weight=0.1, objective__clip_high=0.28))
    recipes.check(changed(objective__loss="gspo", objective__gspo_clip_low=0.1))
    recipes.check(changed(guidance__treatment="shaped", guidance__gamma=0.2))


def test_batches_of_rl_do_not_matter_to_methods_without_it():
    fields = {"sft__batch_size": 64, "eval__batch_size": 64, "rl__batch_size": 30, "guidance__replace": 99}
    cfg.validate_together(changed(**fields, method="sft", rl__steps=0), 64)
    cfg.validate_together(changed(**fields, method="dpo", dpo__batch_size=64), 64)
    with pytest.raises(ConfigError, match="rl.batch_size=30 cannot be split into 64 data shards"):
        cfg.validate_together(changed(**fields), 64)


def test_own_answers_that_can_never_be_there_are_refused():
    own = {"guidance__source": "own", "rl__steps": 10, "rl__batch_size": 8, "rl__group_size": 4}
    with pytest.raises(ConfigError) as error:
        cfg.check_guidance(changed(**own), pairs=80)
    assert "own can never act: in rl.steps=10 x rl.batch_size=8 none of the 80 pairs is met twice" in str(error.value)
    assert "use guidance.threshold=0.25, at least 11 steps" in str(error.value)
    cfg.check_guidance(changed(**own), pairs=79)  # so one pair is met a second time
    cfg.check_guidance(changed(**own, difficulty__pool=2), pairs=159)  # likewise: each step is given 16
    with pytest.raises(ConfigError, match=r"x difficulty.pool=2 none of the 160 pairs .* at least 11 steps"):
        cfg.check_guidance(changed(**own, difficulty__pool=2), pairs=160)
    cfg.check_guidance(changed(**own, guidance__threshold=0.25), pairs=80)  # one right answer of four, and it fails
    with pytest.raises(ConfigError, match="use guidance.threshold=0.3334,"):  # 0.3333 would not be enough either
        cfg.check_guidance(changed(**own | {"rl__group_size": 3}), pairs=80)
    cfg.check_guidance(changed(**own | {"rl__group_size": 3}, guidance__threshold=0.3334), pairs=80)
    cfg.check_guidance(changed(rl__steps=10), pairs=80)
    cfg.check_guidance(changed(**own, guidance__enabled=False), pairs=80)
    cfg.check_guidance(changed(**own, method="dpo"), pairs=80)


def test_answers_under_the_grammar_need_room_for_the_longest_thought_too():
    check = {"rl__constrained": True, "data__response_len": 15}
    message = "data.response_len=15 with rl.constrained=True: an answer can be sure to be whole only in 16 tokens"
    with pytest.raises(ConfigError, match=re.escape(message)):
        cfg.check_constrained(changed(**check), shortest=16)
    cfg.check_constrained(changed(**check), shortest=15)
    cfg.check_constrained(changed(data__response_len=15), shortest=16)


def test_guidance_that_is_off_needs_no_capacity():
    config = recipes.base()
    config.update_from_flattened_dict({"guidance.enabled": False, "guidance.capacity": 0.0, "guidance.replace": 99})
    cfg.validate_together(config)


# ------------------------------------------------------------------------------- resolving and comparing


def test_resolve_follows_references_and_is_json():
    config = ConfigDict({"rl": {"steps": 5}})
    config.copy_of_steps = config.rl.get_oneway_ref("steps")
    config.rl.steps = 7
    assert json.loads(json.dumps(cfg.resolve(config))) == {"copy_of_steps": 7, "rl": {"steps": 7}}


def test_digest_changes_with_the_fields():
    one, two = recipes.base(), recipes.base()
    two.eval.every, two.eval.pairs = 7, 3
    assert cfg.config_digest(one) != cfg.config_digest(two)
    assert cfg.config_digest(one) == cfg.config_digest(recipes.base())


def test_diff_reads_as_lines():
    old, new = {"rl": {"group_size": 8, "steps": 1}, "a": 1}, {"rl": {"group_size": 16, "steps": 1}, "b": "x"}
    assert cfg.diff(old, new) == [
        "a: 1 -> (absent)",
        "b: (absent) -> x",
        "rl.group_size: 8 -> 16",
    ]
    assert cfg.diff(recipes.base(), recipes.base()) == []


# -------------------------------------------------------------------------------------- the command line

CONFIG_FILE = """
from ml_collections import ConfigDict
from agrl_jax.runtime.config import parse_arg

def get_config(arg=None):
    if arg == "bug":
        return ConfigDict().nothing
    parse_arg(arg, variant=("agrl", "grpo"))
    return ConfigDict({"seed": 0, "rl": {"steps": 10, "rate": 0.5, "on": True}})
"""


@pytest.fixture
def parse(tmp_path, monkeypatch):
    """The config of a command line that is parsed with fresh flags; FILE stands for a config file."""
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG_FILE)

    def run(line: str) -> ConfigDict:
        argv = ["program", *line.replace("FILE", str(path)).split()]
        sys.modules.pop("config_config", None)  # otherwise the module of the config loaded before is used again
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
        flags.mark_flag_as_required("config", flag_values=values)
        monkeypatch.setattr(flags, "FLAGS", values)
        cfg.parse_flags(argv)
        return values.config

    return run


def test_overrides_reach_the_config(parse):
    config = parse("--config=FILE:grpo --config.rl.steps=3 --config.rl.rate=1 --noconfig.rl.on")
    assert config.rl.to_dict() == {"steps": 3, "rate": 1.0, "on": False}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--config=FILE --config.rl.stps=3", "--config.rl.stps=3: unknown field rl.stps; did you mean 'rl.steps'?"),
        ("--config FILE --config.sed=3", "--config.sed=3: unknown field sed; did you mean 'seed'?"),
        ("--config=FILE --config.seed.x=3", "--config.seed.x=3: unknown field seed.x; did you mean 'seed'?"),
        ("--config=FILE --config.rl.steps=abc", "rl.steps is 'abc', expected a whole number such as 10"),
        ("--config=FILE --config.rl.steps=1.5", "rl.steps is '1.5', expected a whole number such as 10"),
        ("--config=FILE --config.rl.rate=fast", "rl.rate is 'fast', expected a number such as 0.5"),
        ("--config=FILE --config.rl.on=perhaps", "rl.on is 'perhaps', expected true or false"),
        ("--config=FILE --config.rl=3", "rl is a group of fields; set one of them, such as rl."),
        ("--config=FILE:gppo", "variant=gppo: not one of agrl, grpo; did you mean 'grpo'"),
        ("--config=nowhere.py", "the config file cannot be read: [Errno 2] No such file or directory: 'nowhere.py'"),
        ("--config=None", "'None'; name one, such as --config=configs/quickstart.py"),
        ("", "--config is needed, such as --config=configs/quickstart.py"),
        (f"--config={schema.__file__}", "a file without a function get_config; name a config, such as --config="),
        ("--config=nowhere.py --config.rl.steps=1", "No such file or directory: 'nowhere.py'"),
        ("--config.rl.steps=3", "--config.rl.steps needs --config=FILE before it"),
        ("--config=FILE config.rl.steps=3", "unexpected argument 'config.rl.steps=3'; flags start with --"),
        ("--config=FILE --wrokdir=x", "Unknown command line flag 'wrokdir'"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(parse, capsys, line, message):
    with pytest.raises(SystemExit) as stop:
        parse(line)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith("error: ") and said.count("\n") == 1
    assert message in said


def test_two_mistakes_are_reported_together(parse, capsys):
    with pytest.raises(SystemExit):
        parse("--config=FILE --config.rl.stps=3 --config.rl.rate=x")
    said = capsys.readouterr().err
    assert "unknown field rl.stps" in said and "rl.rate is 'x'" in said


def test_a_bug_in_a_config_file_keeps_its_traceback(parse):
    with pytest.raises(AttributeError, match="nothing"):
        parse("--config=FILE:bug")
