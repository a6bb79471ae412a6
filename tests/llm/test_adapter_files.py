"""A PEFT adapter as reference policy and as start: against PEFT itself, with other ranks and scales, and refusals."""

import pytest
import torch

from tests.llm.conftest import quiet_trainer, spread_members, tiny_base, tiny_batch
from vifamily.errors import CheckpointError, ConfigError
from vifamily.llm.corpora import contradictory_pairs
from vifamily.llm.options import EnsembleOptions
from vifamily.llm.tiny import tiny_tokenizer
from vifamily.rng import scoped

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from vifamily.llm._stacked import StackedCausalLM  # noqa: E402
from vifamily.llm.adapter_files import SavedAdapter, start_from_adapter  # noqa: E402
from vifamily.llm.ensemble import Ensemble  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
WIDE = ["q_proj", "v_proj", "down_proj"]


def saved(folder, vocab=37, seed=9, **more):
    """An adapter that PEFT itself wrote, and the model it belongs to."""
    config = peft.LoraConfig(
        **{"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **more}
    )
    with scoped(0):
        model = peft.get_peft_model(tiny_base(vocab=vocab), config)
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=source, dtype=torch.float64))
    model.save_pretrained(folder)
    return model.eval()


def stack(members=2, r=3, vocab=37, targets=WIDE):
    model = StackedCausalLM(
        tiny_base(vocab=vocab), peft.LoraConfig(r=r, lora_alpha=6, target_modules=targets), members, seed=4
    )
    spread_members(model)
    return model


def by_peft(model, batch):
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1].double()
    each = logits.log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)
    return (each * batch.completion_mask[:, 1:]).sum(-1)


def rows_of(batch):
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask,
            "completion_mask": batch.completion_mask}  # fmt: skip


@torch.no_grad()
def test_the_adapter_scores_as_peft_does_and_members_come_back(tmp_path):
    theirs, model, batch = saved(tmp_path), stack(), tiny_batch()
    before = model.row_log_prob(**rows_of(batch))
    with SavedAdapter(tmp_path, model).on(model):
        found = model.row_log_prob(**rows_of(batch), members=(0, 1))[0]
    assert torch.allclose(found, by_peft(theirs, batch), atol=1e-6)  # PEFT keeps adapters in float32
    assert torch.equal(model.row_log_prob(**rows_of(batch)), before)


@torch.no_grad()
def test_members_start_near_the_adapter(tmp_path):
    theirs, model, batch = saved(tmp_path), stack(3), tiny_batch()
    exact = by_peft(theirs, batch)
    start_from_adapter(model, tmp_path, noise=1e-9)
    # rank 3 over rank 2, and layers that the adapter leaves alone
    for name, layer in model.adapters():
        if name.endswith("down_proj"):
            layer.lora_B.zero_()
    assert torch.allclose(model.row_log_prob(**rows_of(batch)), exact.expand(3, -1), atol=1e-6)
    start_from_adapter(model, tmp_path, noise=0.1, seed=1)
    layer = next(model.adapters())[1]
    assert not torch.equal(layer.lora_A[0], layer.lora_A[1])
    with pytest.raises(ConfigError, match="rank 2, members have 1"):
        start_from_adapter(stack(r=1), tmp_path)
    with pytest.raises(ConfigError, match="stay alike"):
        start_from_adapter(model, tmp_path, noise=0.0)


def test_training_against_it_is_training_against_its_log_probabilities(tmp_path):
    pairs = list(contradictory_pairs(2, 3, torch.Generator().manual_seed(0), length=3))
    tokenizer = tiny_tokenizer([r[c] for r in pairs for c in ("prompt", "chosen", "rejected")], kind="word")
    saved(tmp_path / "adapter", vocab=len(tokenizer))

    def trainer(records, **options):
        return quiet_trainer(
            stack(vocab=len(tokenizer)), tmp_path, records, tokenizer, EnsembleOptions(**options), preferences=True,
            per_device_train_batch_size=3, max_steps=2,
        )  # fmt: skip

    folder = str(tmp_path / "adapter")
    one = trainer(pairs, reference_adapter=folder)
    batch = one.data_collator([one.train_dataset[i] for i in range(len(pairs))])
    with torch.no_grad(), one._reference_adapter.on(one._ensemble):
        names = ("input_ids", "attention_mask", "completion_mask")
        value = one._ensemble.row_log_prob(*(batch[n] for n in names), members=(0, 1))[0]
    chosen, rejected = value.chunk(2)
    known = [
        {**r, "ref_chosen_logps": float(c), "ref_rejected_logps": float(d)}
        for r, c, d in zip(pairs, chosen, rejected, strict=True)
    ]
    other = trainer(known)
    one.train(), other.train()
    for a, b in zip(one._ensemble.adapter_parameters(), other._ensemble.adapter_parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-9)
    ensemble = Ensemble(one._ensemble, tokenizer)
    found = ensemble.preference_log_likelihood(pairs, beta=0.2, reference_adapter=folder)
    ll = one._ensemble.row_log_prob(*(batch[n] for n in names)).detach().chunk(2, 1)
    expected = torch.nn.functional.logsigmoid(0.2 * (ll[0] - chosen - ll[1] + rejected))
    assert torch.allclose(found, expected.double(), atol=1e-9)
    with pytest.raises(ConfigError, match="leave one of them out"):
        trainer(known, reference_adapter=folder)


def test_refusals(tmp_path):
    model = stack(targets=["q_proj"])
    saved(tmp_path / "wide")
    with pytest.raises(ConfigError, match="v_proj', which members do not"):
        SavedAdapter(tmp_path / "wide", model)
    with pytest.raises(CheckpointError, match="no adapter_config"):
        SavedAdapter(tmp_path / "nothing", model)
    (tmp_path / "wide" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no adapter_model"):
        SavedAdapter(tmp_path / "wide", model)
    saved(tmp_path / "dora", use_dora=True)
    with pytest.raises(ConfigError, match="use_dora"):
        SavedAdapter(tmp_path / "dora", stack())
    with pytest.raises(ConfigError, match="leave it out for answers"):
        quiet_trainer(
            model, tmp_path, None, tiny_tokenizer(["a b"], kind="word"), EnsembleOptions(reference_adapter="x")
        )
