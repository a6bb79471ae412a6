"""Configurations that come with the package: all parse, and each trains with a tiny base and tiny data in its place."""

import json
import shutil

import pytest
import yaml
from typer.testing import CliRunner

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from vifamily.cli import app  # noqa: E402
from vifamily.errors import ConfigError, DataError, UnknownNameError  # noqa: E402
from vifamily.llm import base_size, running, save_base, step_cost, tiny_model, tiny_tokenizer  # noqa: E402
from vifamily.llm.named_sets import converted  # noqa: E402
from vifamily.llm.ready import config_path, configs  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::vifamily.errors.VifamilyWarning"),
]

RUNS = [name for name in configs() if not name.startswith("accelerate")]
QUESTION = {"question": "two plus two", "choices": ["three", "four", "five", "six"], "answer": 1}
UNSAFE = {"prompt": "how to kill a process", "category": "violence"}


def call(*arguments):
    return CliRunner().invoke(app, ["llm", *[str(a) for a in arguments]])


@pytest.mark.parametrize("name", RUNS)
def test_every_run_parses(name):
    settings, options, training = running.parse(["--report_to", "none", "--use_cpu", "true"], config_path(name))
    assert settings.num_members == 8 and options.renyi_alpha == 0.8
    assert settings.model_name_or_path.startswith(("Qwen/Qwen2-", "microsoft/Phi-3-mini"))
    assert (settings.dataset_name, settings.dataset_format) in (
        ("cais/mmlu", "mmlu"),
        ("bench-llm/or-bench", "or_bench"),
    )
    assert settings.shard_base == training.gradient_checkpointing == name.endswith("8gpu")
    assert training.max_steps > options.renyi_alpha_warmup_steps > 0


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    texts = [converted([QUESTION], "mmlu")[0]["prompt"], UNSAFE["prompt"], "Sure, I can't help with that. I'm sorry"]
    tokenizer = tiny_tokenizer(texts, kind="bpe", vocab_size=320)
    save_base(folder / "base", tiny_model(tokenizer, hidden_size=16, num_layers=1, num_heads=2), tokenizer)
    for kind, record in (("mmlu", QUESTION), ("or_bench", UNSAFE)):
        lines = [json.dumps({**record, "category": str(i)}) + "\n" for i in range(8)]
        (folder / f"{kind}.jsonl").write_text("".join(lines))
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_every_run_is_rehearsed_over_a_base_without_weights(name, home, tmp_path):
    kind, command = ("or_bench", "dpo") if name.startswith("or-bench") else ("mmlu", "sft")
    shutil.copytree(home / "base", tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    done = call(
        command, "--config", name, "--model_name_or_path", tmp_path / "base", "--dataset_name", home / f"{kind}.jsonl",
        "--output_dir", tmp_path / "out", "--use_cpu", "true", "--report_to", "none", "--dry_run", "true",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "8 rows of 8 records" in done.stdout and "memory of a device" in done.stdout and "K = 8" in done.stdout
    assert "nothing is written" in done.stdout and not (tmp_path / "out").exists()


def test_a_rehearsal_reads_a_large_base_from_its_settings_alone(home, tmp_path):
    shutil.copytree(home / "base", tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    transformers.Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False, dtype="bfloat16",
    ).save_pretrained(tmp_path / "base")  # fmt: skip
    done = call(
        "sft", "--model_name_or_path", tmp_path / "base", "--dataset_name", home / "mmlu.jsonl", "--dataset_format",
        "mmlu", "--output_dir", tmp_path / "out", "--use_cpu", "true", "--num_members", 8, "--dry_run", "true",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "7.62 G weights" in done.stdout and "40.4 M weights each" in done.stdout and "bfloat16" in done.stdout


@pytest.mark.parametrize("name", ["mmlu-phi-3-mini", "mmlu-qwen2-7b-8gpu", "or-bench-qwen2-1.5b"])
def test_a_run_trains_with_a_tiny_base(name, home):
    kind, command = ("or_bench", "dpo") if name.startswith("or-bench") else ("mmlu", "sft")
    done = call(
        command, "--config", name, "--model_name_or_path", home / "base", "--dataset_name", home / f"{kind}.jsonl",
        "--output_dir", home / name, "--max_steps", 2, "--lora_r", 2, "--per_device_train_batch_size", 2,
        "--dtype", "float32", "--report_to", "none", "--use_cpu", "true", "--disable_tqdm", "true",
        "--shard_base", "false", "--dataloader_pin_memory", "false",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    # the cost of a step is said before the first one
    assert "8 rows of 8 records" in done.output and done.output.index("memory of a device") < done.output.index(
        "wrote "
    )
    assert len(list((home / name).glob("member_*"))) == 8


def test_eight_gpus_hold_the_run_over_seven_billion_weights():
    said = yaml.safe_load(config_path("mmlu-qwen2-7b-8gpu").read_text())
    size = base_size(
        transformers.Qwen2Config(
            hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
            num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False,
        )
    )  # fmt: skip
    assert size.num_weights == pytest.approx(7.6156e9, rel=1e-3)  # as its model card says
    cost = step_cost(
        size, num_members=said["num_members"], lora_r=said["lora_r"], length=said["max_length"],
        batch_size=8 * said["per_device_train_batch_size"], gradient_checkpointing=said["gradient_checkpointing"],
        devices=8, sharded=True,
    )  # fmt: skip
    # members of 40 million weights each, at 16 bytes: 5.2 GB; the rest is small beside 80 GB
    assert cost.adapter_bytes + cost.optimiser_bytes == pytest.approx(16 * 8 * 40.37e6, rel=1e-3)
    assert cost.total_bytes < 40e9


def test_the_launcher_is_one_of_accelerate():
    read = pytest.importorskip("accelerate.commands.config.config_args").load_config_from_file
    assert read(str(config_path("accelerate-8gpu"))).num_processes == 8


def test_the_command_lists_and_prints():
    listed = call("configs").output
    assert all(f"{name}: " in listed for name in configs())
    assert yaml.safe_load(call("configs", "mmlu-phi-3-mini").output)["num_members"] == 8
    assert call("configs", "mmlu-phi").exit_code != 0
    with pytest.raises(UnknownNameError, match="Did you mean 'mmlu-phi-3-mini'"):
        config_path("mmlu-phi-3-min")


def test_records_of_other_formats():
    assert converted([QUESTION], "mmlu")[0]["completion"] == " B"
    [pair] = converted([UNSAFE], "or_bench")
    assert pair["chosen"][0]["role"] == "assistant" and pair["prompt"][0]["content"] == UNSAFE["prompt"]
    with pytest.raises(ConfigError, match="mmlu, or_bench"):
        converted([QUESTION], "mmlu2")
    with pytest.raises(DataError, match="no column 'choices'"):
        converted([UNSAFE], "mmlu")
    with pytest.raises(DataError, match="answer 7 of 4"):
        converted([{**QUESTION, "answer": 7}], "mmlu")
