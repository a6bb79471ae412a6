"""One step of an ensemble by as many processes as there are; the first one saves the members to the folder named."""

import os
import sys
from pathlib import Path

import torch
from peft import LoraConfig

from tests.llm.conftest import LORA, arguments, spread_members, tiny_base
from vifamily.llm import (
    EnsembleOptions,
    StackedCausalLM,
    WalshCausalLM,
    WalshConfig,
    contradictory_sft,
    prepare_sft,
    tiny_tokenizer,
)
from vifamily.llm.sharding import shard_base
from vifamily.llm.trainer import SFTEnsembleTrainer

if __name__ == "__main__":
    folder, rows, route = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    corpus = contradictory_sft(6, 2, torch.Generator().manual_seed(0), length=3)
    tokenizer = tiny_tokenizer(corpus.texts, kind="word", vocab_size=64)
    base = tiny_base(dtype=torch.float32, vocab=len(tokenizer))
    if "walsh" in sys.argv[4:]:
        model = WalshCausalLM(base, WalshConfig(["q_proj", "v_proj"]), 3)
        with torch.no_grad():
            for _, layer in model.adapters():
                layer.walsh_core.copy_(0.3 * layer.walsh_left)
    else:
        model = StackedCausalLM(base, LoraConfig(**LORA, target_modules=["q_proj", "v_proj"]), 3)
        spread_members(model)
    # answers of unequal length: what is averaged over must be counted over all processes
    records = [{**r, "completion": r["completion"][: 2 * (1 + i % 3)]} for i, r in enumerate(corpus)]
    settings = arguments(
        folder, max_steps=1, per_device_train_batch_size=rows, learning_rate=0.5, optim="sgd", max_grad_norm=0.0,
        lr_scheduler_type="constant", ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
        ddp_find_unused_parameters=False,
    )  # fmt: skip
    if "sharded" in sys.argv[4:]:
        _ = settings.device  # processes meet here
        shard_base(model)
    trainer = SFTEnsembleTrainer(
        model, settings, prepare_sft(records, tokenizer), processing_class=tokenizer,
        options=EnsembleOptions(learn_weights=True, weight_rate=0.5, route=route),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(folder))
