"""The commands on language models: a run from flags and a file, its ensemble in use, and one-line errors."""

import json
import shutil
import warnings

import pytest
import torch
from typer.testing import CliRunner

from vifamily.cli import app
from vifamily.llm.corpora import contradictory_pairs, contradictory_sft

pytest.importorskip("peft")
pytest.importorskip("transformers")

from vifamily.llm import save_base, tiny_model, tiny_tokenizer  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    source = torch.Generator().manual_seed(0)
    answers, pairs = contradictory_sft(8, 4, source, length=2), contradictory_pairs(2, 4, source, length=2)
    tokenizer = tiny_tokenizer([*answers.texts, *pairs.texts], kind="word", vocab_size=64)
    save_base(folder / "base", tiny_model(tokenizer, hidden_size=16, num_layers=1, num_heads=2), tokenizer)
    for name, records in (("answers", answers), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def call(*arguments):
    return CliRunner().invoke(app, ["llm", *[str(a) for a in arguments]])


def common(home, data, out):
    return [
        "--model_name_or_path", home / "base", "--dataset_name", home / data, "--output_dir", out, "--max_steps", 2,
        "--report_to", "none", "--use_cpu", "true", "--disable_tqdm", "true", "--lora_r", 2, "--lora_alpha", 4,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def ensemble(home):
    out = home / "ensemble"
    config = home / "run.yaml"
    config.write_text("num_members: 3\nrenyi_alpha: 0.5\nlearning_rate: 1.0e-2\nlora_target_modules: q_proj,v_proj\n")
    done = call("sft", "--config", config, *common(home, "answers.jsonl", out), "--renyi_alpha", 0.7,
                "--eval_file", home / "answers.jsonl")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "12 rows of 12 records" in done.output and "members" in done.output and f"wrote {out}" in done.output
    return out


def test_a_run_keeps_what_it_was_told(ensemble):
    content = json.loads(call("inspect", ensemble, "--json").output)
    assert content["num_members"] == 3
    assert content["training"]["renyi_alpha"] == 0.7  # the flag, not the file
    text = call("inspect", ensemble).output
    assert "3 members over" in text and "unit: sequence" in text


@pytest.mark.parametrize("family", ["mean_field", "dropout", "laplace"])
def test_baselines_end_in_an_ensemble_of_draws(family, home):
    out = home / family
    more = ["--prior_weight", 0.01] if family == "mean_field" else []
    done = call("sft", *common(home, "answers.jsonl", out), "--num_members", 3, "--family", family,
                "--learning_rate", 0.01, *more)  # fmt: skip
    assert done.exit_code == 0, done.output
    content = json.loads(call("inspect", out, "--json").output)
    assert content["num_members"] == 3
    assert (content["training"]["family"], content["training"]["renyi_alpha"]) == (family, 0.0)
    scores = json.loads(call("eval", out, home / "answers.jsonl", "--json").stdout)["member_scores"]
    assert len(scores) == 3 and len(set(scores)) == 3
    wrong = call("sft", *common(home, "answers.jsonl", out), "--family", "normal")
    assert wrong.exit_code != 0 and "--family must be" in wrong.output


def test_walsh_hadamard_members(home):
    out, given = home / "walsh", common(home, "answers.jsonl", home / "walsh")[:-4]  # no rank, no scale of LoRA
    done = call("sft", *given, "--adapter", "walsh_hadamard", "--num_members", 3, "--learning_rate", 0.01,
                "--lora_target_modules", "q_proj,v_proj", "--walsh_scale", 0.5)  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "Members have 96 numbers each" in done.output  # two layers of 16 inputs, three for each
    content = json.loads(call("inspect", out, "--json").output)
    assert (content["adapter"], content["num_members"]) == ("walsh_hadamard", 3)
    assert json.loads((out / "member_2" / "walsh_hadamard.json").read_text())["scale"] == 0.5
    scores = json.loads(call("eval", out, home / "answers.jsonl", "--json").stdout)["member_scores"]
    assert len(set(scores)) == 3
    pairs = common(home, "pairs.jsonl", home / "walsh-dpo")[:-4]
    done = call("dpo", *pairs, "--adapter", "walsh_hadamard", "--num_members", 2, "--unit", "group",
                "--group_column", "group")  # fmt: skip
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--adapter", "dora"], "--adapter must be one of lora, walsh_hadamard"),
        (["--adapter", "walsh_hadamard", "--family", "dropout"], "--family dropout is made for LoRA"),
        (["--adapter", "walsh_hadamard", "--initial_adapter", "x"], "--initial_adapter is a LoRA adapter"),
        (["--adapter", "walsh_hadamard"], "--lora_r is of LoRA adapters"),
    ],
)
def test_adapters_that_do_not_go_with_other_flags(home, more, words):
    done = call("sft", *common(home, "answers.jsonl", home / "refused"), *more)
    assert done.exit_code == 2 and words in done.output


def test_an_ensemble_is_scored_routed_and_speaks(home, ensemble):
    found = call("eval", ensemble, home / "answers.jsonl", "--json")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["num_units"] == 12
    assert "mixture" in call("eval", ensemble, home / "answers.jsonl").output
    routed = call("route", ensemble, home / "answers.jsonl", "--out", home / "routing.png")
    assert "responsibilities for 12 units" in routed.output and (home / "routing.png").stat().st_size > 5000
    said = [
        call("generate", ensemble, "blend : a b =", "--speaker", s, "--num-answers", 2, "--max-new-tokens", 3, *more)
        for s, more in (("draw", ()), ("mixture", ()), ("member", ("--member", 1)))
    ]
    assert [one.exit_code for one in said] == [0, 0, 0], said[0].output


def test_preferences(home):
    done = call("dpo", *common(home, "pairs.jsonl", home / "dpo"), "--unit", "group", "--group_column", "group",
                "--num_members", 2, "--beta", 0.2)  # fmt: skip
    assert done.exit_code == 0, done.output
    found = [
        json.loads(call("eval", home / "dpo", home / "pairs.jsonl", "--json", *more).stdout)["mixture"]
        for more in ((), ("--beta", 0.2), ("--beta", 0.9))
    ]
    assert found[0] == found[1] != found[2]  # as it was trained
    assert "log score per unit, 8 units" in call("eval", home / "dpo", home / "pairs.jsonl").output
    by_pair = call("route", home / "dpo", home / "pairs.jsonl").output
    by_group = call("route", home / "dpo", home / "pairs.jsonl", "--group-column", "group", "--out", home / "g.png")
    assert "responsibilities for 8 units (pair)" in by_pair
    assert "responsibilities for 2 units (group)" in by_group.output and (home / "g.png").stat().st_size > 5000
    wrong = call("route", home / "dpo", home / "pairs.jsonl", "--group-column", "nobody")
    assert wrong.exit_code == 2 and "is not among the columns" in wrong.stderr


def test_the_demonstration_runs(tmp_path):
    done = call("demo", "--quick", "--out", tmp_path / "demo")
    assert done.exit_code == 0, done.output
    names = {path.name for path in (tmp_path / "demo").iterdir()}
    assert names == {"base", "ensemble", "routing.png", "uncertainty.png", "figures.json"}
    assert "first token, conflicting" in done.output
    assert call("generate", tmp_path / "demo" / "ensemble", "blend : a b =", "--max-new-tokens", 2).exit_code == 0


def test_help_and_flags():
    assert all(word in call("--help").output for word in ("sft", "dpo", "eval", "generate", "route", "inspect", "demo"))
    assert "vifamily llm dpo --model_name_or_path" in " ".join(call("dpo", "--help").output.split())
    assert "--renyi_alpha 0.8" in call("sft", "--flags").output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sft", "--num_member", "3"], "Did you mean '--num_members'"),
        (["sft", "--dataset_name", "x.jsonl"], "--model_name_or_path is missing"),
        (["sft", "--model_name_or_path", "x"], "--dataset_name is missing"),
        (["sft", "--unit", "word"], "unit must be one of"),
        (["sft", "--packing", "true"], "--packing cannot be used for an ensemble: rows must stay apart"),
        (["sft", "--use_dora", "true"], "DoRA rescales the merged weight of each member"),
        (["dpo", "--lora_modules_to_save=lm_head"], "a copy of it for each member"),
        (["sft", "--deepspeed", "x.json"], "--shard_base true shares"),
        (["sft", "--use_peft", "false"], "cannot be switched off"),
        (["sft", "--num_members", "three"], "invalid int value: 'three'"),
        (["sft", "--num_members", "2", "three"], "of no flag are: ['three']"),
        (["sft", "three"], "'three' belongs to no flag"),
        (["sft", "--config", "mmlu"], "Configurations that come along: accelerate-8gpu"),
        (["inspect", "nowhere"], "holds no ensemble.json"),
    ],
)
def test_errors_are_one_line(arguments, words):
    done = call(*arguments)
    assert done.exit_code in (1, 2)
    assert words in done.stderr and "Traceback" not in done.output


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--report_to", "nonsense"], "the run cannot be set up: nonsense is not supported"),
        (["--eval_strategy", "steps", "--eval_steps", 1], "didn't pass an `eval_dataset`"),
        (["--load_in_4bit", "true", "--load_in_8bit", "true"], "exclude each other"),
        (["--learning_rate", "nan"], "learning_rate must be a finite number"),
        (["--per_device_train_batch_size", 0], "per_device_train_batch_size must be from 1"),
        (["--dtype", "half"], "--dtype must be one of"),
        (["--lora_alpha", 0], "must be a positive number"),
        (["--lora_dropout", 0.05], "--lora_dropout 0.05 is for --family dropout alone"),
        (["--output_dir", "/proc/nowhere"], "cannot write to the folder"),
        (["--model_name_or_path", "/nowhere"], "cannot load the tokenizer of the base"),
        (["--pad_token", "nonsense"], "--pad_token 'nonsense' is not in the tokenizer's vocabulary"),
        (["--chat_template_path", "nowhere"], "cannot read --chat_template_path"),
        (["--resume_from_checkpoint", "nowhere"], "nowhere is no checkpoint"),
        (["--max_length", 3], "No row is left"),
    ],
)
def test_settings_that_cannot_be_used_are_one_line(home, more, words):
    done = call("sft", *common(home, "answers.jsonl", home / "refused"), *more)
    assert done.exit_code in (1, 2) and "Traceback" not in done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)
    assert words in done.stderr


def test_flags_and_files_as_trl_has_them(home, tmp_path):
    given = common(home, "answers.jsonl", tmp_path / "flags")
    assert call("sft", *given, "--lora_target_modules", "q_proj", "v_proj", "--packing", "false", "--use_peft",
                "--loss_type", "sigmoid").exit_code == 0  # fmt: skip
    config = tmp_path / "run.yaml"
    config.write_text(
        "lora_target_modules: [q_proj, v_proj]\nsave_strategy: no\nmodules_to_save: null\nuse_dora: false\n"
        "lr_scheduler_type: cosine_with_restarts\nlr_scheduler_kwargs: {num_cycles: 2}\nreport_to: [none]\n"
    )
    done = call("sft", "--config", config, *common(home, "answers.jsonl", tmp_path / "file"))
    assert done.exit_code == 0, done.output
    names = [json.loads((tmp_path / f / "member_0/adapter_config.json").read_text()) for f in ("flags", "file")]
    assert [n["target_modules"] for n in names] == [["q_proj", "v_proj"]] * 2
    config.write_text("a: [\n")
    wrong = call("sft", "--config", config)
    assert wrong.exit_code == 2 and "is no YAML" in wrong.stderr


def test_a_tokenizer_without_a_pad_token_is_given_one(home, tmp_path):
    transformers = pytest.importorskip("transformers")
    shutil.copytree(home / "base", tmp_path / "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(home / "base")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "base")
    given = [tmp_path / "base" if word == home / "base" else word for word in common(home, "answers.jsonl", tmp_path)]
    wrong = call("sft", *given)
    assert wrong.exit_code == 2 and "no pad token" in wrong.stderr and "give --pad_token '<|end|>'" in wrong.stderr
    assert call("sft", *given, "--pad_token", "<|end|>").exit_code == 0


def test_warnings_are_sentences(home, tmp_path):
    lines = (home / "answers.jsonl").read_text().splitlines()
    (tmp_path / "long.jsonl").write_text("\n".join([*lines, json.dumps({"prompt": "a " * 40, "completion": "b"})]))
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        done = call("sft", *common(home, tmp_path / "long.jsonl", tmp_path / "out"), "--max_length", 30)
    assert "warning: 1 of 13 records are longer than max_length=30 tokens" in done.stderr
    assert ".py:" not in done.stderr and "1 left out as too long" in done.stdout


def test_a_file_with_an_unknown_key(tmp_path):
    (tmp_path / "run.yaml").write_text("renyi_alfa: 0.5\n")
    done = call("sft", "--config", tmp_path / "run.yaml")
    assert done.exit_code == 2 and "Did you mean 'renyi_alpha'" in done.stderr
    (tmp_path / "run.yaml").write_text("packing: true\n")
    assert "rows must stay apart" in call("sft", "--config", tmp_path / "run.yaml").stderr
