"""A base that is shared out: what is refused. What it computes is compared in test_two_processes.py."""

import pytest

from tests.llm.conftest import LORA, tiny_base
from vifamily.errors import ConfigError

peft = pytest.importorskip("peft")

from vifamily.llm import EnsembleOptions, StackedCausalLM, shard_base  # noqa: E402
from vifamily.llm._arguments import check_engines  # noqa: E402
from vifamily.llm.sharding import _layers  # noqa: E402


def ensemble():
    return StackedCausalLM(tiny_base(), peft.LoraConfig(**LORA, target_modules="all-linear"), 2)


def test_one_process_has_nobody_to_share_with():
    with pytest.raises(ConfigError, match="torchrun"):
        shard_base(ensemble())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_decoder_layers_are_found(kind):
    targets = ["c_attn"] if kind == "gpt2" else ["q_proj"]
    config = peft.LoraConfig(**LORA, target_modules=targets, layers_to_transform=[1], fan_in_fan_out=kind == "gpt2")
    found = _layers(StackedCausalLM(tiny_base(kind, layers=3), config, 2))
    assert len(found) == 3  # with those below the first adapted one


class Engine:
    is_deepspeed_enabled = is_fsdp_enabled = False


def test_groups_over_a_shared_base_need_equal_steps():
    grouped = EnsembleOptions(unit="group", group_column="who")
    with pytest.raises(ConfigError, match="ranks"):
        check_engines(Engine(), sharded=True, options=grouped)
    check_engines(Engine(), sharded=False, options=grouped)
    check_engines(Engine(), sharded=True, options=EnsembleOptions(unit="group", group_column="who", route="ranks"))
    other = Engine()
    other.is_fsdp_enabled = True
    with pytest.raises(ConfigError, match="shard_base"):
        check_engines(other, sharded=False, options=EnsembleOptions())
