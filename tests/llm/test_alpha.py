"""Alpha that is moved to hold an entropy: the rule on members whose entropy is known, and a run that holds it."""

import math

import pytest
import torch

from tests.llm.conftest import tiny_base
from vifamily.errors import CheckpointError, ConfigError
from vifamily.llm._alpha import AlphaControl
from vifamily.llm._routed import supervised_loss
from vifamily.llm.corpora import contradictory_sft
from vifamily.llm.options import EnsembleOptions
from vifamily.llm.tiny import tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


def tally_of(a, alpha, weight=None):
    row = torch.arange(a.shape[1])
    log_weight = torch.zeros(len(a), dtype=a.dtype) if weight is None else weight.log()
    return supervised_loss(a, row, row, "sequence", alpha, log_weight)[1]


def entropy_of(a, alpha, weight=None):
    return tally_of(a, alpha, weight).sums["routing/entropy"]


@pytest.mark.parametrize("weight", [None, torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)])
def test_the_slope_is_the_derivative_of_the_entropy(weight, seed):
    source = torch.Generator().manual_seed(seed)
    a = -5 * torch.rand(3, 7, generator=source, dtype=torch.float64)
    a[1, 2] = -math.inf
    step = 1e-5
    for alpha in (0.05, 0.7, 3.0):
        up, down = (entropy_of(a, alpha * math.exp(h), weight) for h in (step, -step))
        assert tally_of(a, alpha, weight).slope == pytest.approx(-(up - down) / (2 * step), rel=1e-6, abs=1e-9)


def test_two_members_have_the_entropy_of_a_coin():
    a = torch.tensor([[0.0], [-2.0]], dtype=torch.float64)
    p = 1 / (1 + math.exp(-2 * 0.5))
    coin = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert entropy_of(a, 0.5) == pytest.approx(coin, rel=1e-12)


@pytest.mark.parametrize("start", [0.01, 0.4, 1.0])
def test_alpha_goes_to_the_one_that_has_the_entropy(start):
    # one unit and two members 3 nats apart: the alpha is known in closed form from the coin's probability
    a, p = torch.tensor([[0.0], [-3.0]], dtype=torch.float64), 0.8
    coin = -p * math.log(p) - (1 - p) * math.log(1 - p)
    expected = math.log(p / (1 - p)) / 3
    control = AlphaControl(EnsembleOptions(1.0, start, routing_entropy=coin / math.log(2)), 2)
    path = [start]
    for _ in range(260):
        tally = tally_of(a, path[-1])
        control.after_step(tally.sums["routing/entropy"], tally.slope)
        path.append(control.at(0))
    assert path[-1] == pytest.approx(expected, rel=1e-8)
    # neither too fast nor beyond
    moves = [math.log(b / a) for a, b in zip(path, path[1:], strict=False)]
    assert max(moves) <= 0.02 + 1e-12 and min(moves) >= -0.1 - 1e-12
    assert all((x - expected) * (start - expected) > -1e-9 for x in path)


def test_alpha_stays_in_its_bounds_where_nothing_can_be_routed():
    control = AlphaControl(EnsembleOptions(0.5, routing_entropy=0.5), 2)
    for _ in range(500):
        control.after_step(math.log(2), 0.0)  # members are one: no alpha has the entropy
    assert control.at(0) == 0.5
    for _ in range(200):
        control.after_step(0.0, 0.0)
    assert control.at(0) == pytest.approx(1e-6)
    control.after_step(math.log(2), 0.0)
    assert control.at(0) == pytest.approx(1e-6 * math.exp(0.02))  # no wind-up


def test_refusals():
    with pytest.raises(ConfigError, match="two members"):
        AlphaControl(EnsembleOptions(routing_entropy=0.5), 1)
    with pytest.raises(ConfigError, match="leave renyi_alpha_warmup_steps out"):
        EnsembleOptions(routing_entropy=0.5, renyi_alpha_start=0.01, renyi_alpha_warmup_steps=5)
    with pytest.raises(ConfigError, match="renyi_alpha must be positive"):
        EnsembleOptions(0.0, routing_entropy=0.5)
    with pytest.raises(ConfigError, match="routing_entropy"):
        EnsembleOptions(routing_entropy=1.5)
    with pytest.raises(CheckpointError, match="was not held"):
        AlphaControl(EnsembleOptions(routing_entropy=0.5), 2).restore(None)


def run(folder, steps=140, resume=None, stop=None, **options):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    from vifamily.llm._stacked import StackedCausalLM
    from vifamily.llm.trainer import SFTEnsembleTrainer

    corpus = contradictory_sft(64, 16, torch.Generator().manual_seed(0), length=2, num_symbols=4)
    tokenizer = tiny_tokenizer(corpus.texts, kind="word", vocab_size=64)
    base = tiny_base(dtype=torch.float32, vocab=len(tokenizer))
    model = StackedCausalLM(base, peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear"), 2)
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=20, learning_rate=2e-2, report_to="none",
        lr_scheduler_type="constant", logging_steps=1, save_strategy="steps", save_steps=3 if stop else 1000,
        disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = SFTEnsembleTrainer(
        model, arguments, list(corpus), processing_class=tokenizer,
        options=EnsembleOptions(micro_batch_rows=100, **options),
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    if stop and not resume:

        class Stop(transformers.TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_training_stop = state.global_step >= stop

        trainer.add_callback(Stop())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_the_entropy_is_reached_and_held_on_contradictory_answers(tmp_path):
    found = {}
    for name, options in (
        ("fixed", {"renyi_alpha": 1.0}),
        ("held", {"renyi_alpha": 1.0, "renyi_alpha_start": 1.0, "routing_entropy": 0.6}),
    ):
        log = [e for e in run(tmp_path / name, **options).state.log_history if "loss" in e]
        found[name] = [e["routing/entropy"] / math.log(2) for e in log]
        if name == "held":
            assert len({round(e["renyi_alpha"], 6) for e in log}) > 50
    # fixed, members share nothing at the end; held, entropy is the wanted one over each of three stretches
    assert sum(found["fixed"][-30:]) / 30 < 0.3
    for start in (50, 80, 110):
        # members go on to move apart, which alpha follows by at most 2 % a step upwards
        assert sum(found["held"][start : start + 30]) / 30 == pytest.approx(0.6, abs=0.15)


def test_resuming_a_held_alpha_is_exact_to_the_bit(tmp_path):
    options = {"renyi_alpha": 1.0, "renyi_alpha_start": 0.5, "routing_entropy": 0.6}
    whole = run(tmp_path / "whole", 6, **options)
    run(tmp_path / "cut", 6, stop=3, **options)
    again = run(tmp_path / "cut", 6, resume=True, stop=3, **options)
    assert again._after_step.alpha.at(6) == whole._after_step.alpha.at(6) != 0.5
    pairs = zip(again._ensemble.adapter_parameters(), whole._ensemble.adapter_parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
