"""Tiny random language models, and trainers of them that say nothing."""

import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

LORA = {"r": 3, "lora_alpha": 6}


def tiny_base(kind="llama", seed=0, dtype=torch.float64, layers=2, vocab=37):
    """A random causal language model of some 20,000 parameters."""
    transformers = pytest.importorskip("transformers")
    from vifamily.rng import scoped

    shape = {
        "vocab_size": vocab,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    wide = {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 24}
    if kind == "gpt2":
        config = transformers.GPT2Config(
            n_embd=16, n_layer=layers, n_head=2, n_positions=64, attn_pdrop=0.1, resid_pdrop=0.1, embd_pdrop=0.1,
            **{k: v for k, v in shape.items() if k != "max_position_embeddings"},
        )  # fmt: skip
    else:
        maker = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[kind]
        config = maker(**wide, num_key_value_heads=1, tie_word_embeddings=kind == "llama", **shape)
    with scoped(seed):
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            # the usual start is so small that members would hardly differ
            for name, p in model.named_parameters():
                if p.dim() > 1:
                    p.normal_(0, 0.4 if "emb" in name or "wte" in name else 0.25)
    return model.to(dtype).eval()


def spread_members(model, seed=1):
    """Give members second matrices that are not zero."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in model.adapters():
            drawn = torch.randn(layer.lora_B.shape, generator=source, dtype=torch.float64)
            layer.lora_B.copy_(0.3 * drawn)


def tiny_batch(rows=6, seed=2, vocab=37):
    """Padded rows of unequal length, a prompt of three tokens each."""
    from vifamily.llm._passes import PaddedRows

    source = torch.Generator().manual_seed(seed)
    lengths = [9, 5, 7, 4, 8, 6, 9, 5][:rows]
    ids = torch.randint(3, vocab, (rows, max(lengths)), generator=source)
    position = torch.arange(max(lengths))
    seen = position < torch.tensor(lengths)[:, None]
    return PaddedRows(ids * seen, seen.long(), seen & (position >= 3))


def arguments(folder, **more):
    """TrainingArguments of a short run on the CPU that says nothing and saves nothing unless it is asked to."""
    transformers = pytest.importorskip("transformers")
    settings = {
        "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    return transformers.TrainingArguments(str(folder), **{**settings, **more})


def stop_after(steps):
    """A callback that ends a run early, as one that was cut off."""
    transformers = pytest.importorskip("transformers")

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= steps

    return Stop()


def quiet_trainer(model, folder, records, tokenizer, options=None, *, preferences=False, stop=None, **more):
    """A trainer for answers or preferences, stopped after some steps where that is asked; more goes to arguments."""
    transformers = pytest.importorskip("transformers")
    from vifamily.llm.options import EnsembleOptions
    from vifamily.llm.trainer import DPOEnsembleTrainer, SFTEnsembleTrainer

    trainer = (DPOEnsembleTrainer if preferences else SFTEnsembleTrainer)(
        model, arguments(folder, **more), None if records is None else list(records), processing_class=tokenizer,
        options=options or EnsembleOptions(), callbacks=[] if stop is None else [stop_after(stop)],
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer
