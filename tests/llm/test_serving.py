"""The command for a server says what is in the folder."""

import shlex

import pytest

from tests.llm.conftest import LORA, tiny_base
from vifamily.errors import CheckpointError, ConfigError

peft = pytest.importorskip("peft")

from vifamily.llm import StackedCausalLM, save_members  # noqa: E402
from vifamily.llm.serving import vllm_command  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


@pytest.mark.parametrize(("rank", "room"), [(3, "8"), (8, "8"), (17, "32")])
def test_every_member_is_named_and_fits(rank, room, tmp_path):
    config = peft.LoraConfig(**{**LORA, "r": rank}, target_modules=["q_proj"])
    folder = tmp_path / "an ensemble"
    save_members(StackedCausalLM(tiny_base(layers=1), config, 3), folder)
    words = shlex.split(vllm_command(folder, base="Qwen/Qwen2-1.5B"))
    assert words[:4] == ["vllm", "serve", "Qwen/Qwen2-1.5B", "--enable-lora"]
    assert words[words.index("--max-loras") + 1] == "3"
    assert words[words.index("--max-lora-rank") + 1] == room
    assert words[words.index("--lora-modules") + 1 :] == [f"member_{k}={folder / f'member_{k}'}" for k in range(3)]


def test_what_cannot_be_served(tmp_path):
    with pytest.raises(CheckpointError, match="no ensemble"):
        vllm_command(tmp_path)
    config = peft.LoraConfig(r=520, target_modules=["q_proj"])
    save_members(StackedCausalLM(tiny_base(layers=1), config, 1), tmp_path)
    with pytest.raises(ConfigError, match="520"):
        vllm_command(tmp_path, base="base")
    with pytest.raises(ConfigError, match="base="):
        vllm_command(tmp_path)
