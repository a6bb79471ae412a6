"""Trains a tiny ensemble; ended by SIGKILL after a step or in the middle of writing a checkpoint. Run by a test."""

import os
import signal
import sys
import warnings
from pathlib import Path

import torch
import transformers
from peft import LoraConfig

from tests.llm.conftest import arguments, tiny_base
from vifamily.llm import saving
from vifamily.llm._stacked import StackedCausalLM
from vifamily.llm.corpora import contradictory_sft
from vifamily.llm.options import EnsembleOptions
from vifamily.llm.tiny import tiny_tokenizer
from vifamily.llm.trainer import SFTEnsembleTrainer

STEPS = 6


def train(folder: Path, when: str, resume: bool) -> None:
    """Train; ``when`` is never, "step:3" (after that step) or "write:4" (while checkpoint 4 is written)."""
    corpus = contradictory_sft(12, 4, torch.Generator().manual_seed(0), length=3)
    tokenizer = tiny_tokenizer(corpus.texts, kind="word", vocab_size=64)
    base = tiny_base(dtype=torch.float32, vocab=len(tokenizer))
    model = StackedCausalLM(base, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]), 2, seed=1)
    settings = arguments(
        folder, max_steps=STEPS, per_device_train_batch_size=4, save_strategy="steps", save_steps=2
    )  # fmt: skip
    options = EnsembleOptions(
        0.8, 0.1, routing_entropy=0.6, learn_weights=True, reseed_below=0.2, reseed_patience=2, micro_batch_rows=10
    )

    class Kill(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if when == f"step:{state.global_step}":
                os.kill(os.getpid(), signal.SIGKILL)

    trainer = SFTEnsembleTrainer(
        model, settings, list(corpus), processing_class=tokenizer, options=options, callbacks=[Kill()]
    )
    kind, _, number = when.partition(":")
    if kind == "write":
        written = saving.write_bytes

        def broken_off(path, content):
            if f"checkpoint-{number}" in str(path) and "member_1" in str(path):
                Path(path).parent.mkdir(parents=True)
                Path(path).write_bytes(content[: len(content) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return written(path, content)

        saving.write_bytes = broken_off
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train(resume_from_checkpoint=resume or None)
        trainer.save_model(str(folder / "final"))


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[4]))  # sums of several threads differ in their last bits
    train(Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "resume")
