"""Alpha that is moved to hold an entropy: the rule on members whose entropy is known, and a run that holds it."""

import json
import math

import pytest
import torch

from tests.llm.conftest import quiet_trainer, tiny_base
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
    # neither too fast, nor beyond by more than the change of a slope that is averaged over steps
    moves = [math.log(b / a) for a, b in zip(path, path[1:], strict=False)]
    assert max(moves) <= 0.1 + 1e-12 and min(moves) >= -0.1 - 1e-12
    # where nothing is routed yet it rises slowly
    assert start != 0.01 or all(move <= 0.02 + 1e-12 for move in moves[:100])
    assert all((x - expected) * math.copysign(1, start - expected) > -1e-2 * expected for x in path)


def linear_run(steps, drift=0.0, noise=0.0, source=None):
    """Alpha held on members whose entropy is a straight line in log alpha that drifts; errors before each move."""
    control = AlphaControl(EnsembleOptions(1.0, 0.1, routing_entropy=0.6), 2)
    slope, target = 0.2, 0.6 * math.log(2)
    errors = []
    for step in range(steps):
        error = 0.02 - slope * math.log(control.at(step) / 0.1) + drift * step
        batch = noise * float(torch.randn((), generator=source, dtype=torch.float64)) if noise else 0.0
        control.after_step(target + error + batch, slope)
        errors.append(error)
    return torch.tensor(errors, dtype=torch.float64)


def test_members_that_drift_leave_five_times_their_drift_of_a_step():
    assert linear_run(200, drift=-1e-3)[-1] == pytest.approx(-5e-3, rel=1e-10)
    assert linear_run(200)[-1] == pytest.approx(0.0, abs=1e-10)


def test_noise_of_batches_moves_alpha_neither_up_nor_down(seed):
    sd, steps = 0.05, 20_000
    errors = linear_run(steps, noise=sd, source=torch.Generator().manual_seed(seed))[50:]
    # errors follow an autoregression of which the sum has the noise's own variance, step by step
    assert abs(float(errors.mean())) < 5 * sd / math.sqrt(steps)
    assert float(errors.std()) == pytest.approx(sd / 3, rel=0.1)


def test_what_a_checkpoint_holds_goes_on_exactly():
    options = EnsembleOptions(1.0, 0.3, routing_entropy=0.6)
    whole = AlphaControl(options, 2)
    for step in range(9):
        again = AlphaControl(options, 2)
        again.restore(json.loads(json.dumps(whole.plain())))
        for control in (whole, again):
            control.after_step(0.4 + 0.05 * math.sin(step), 0.2 + 0.01 * step)
        assert again.plain() == whole.plain() and len(whole.plain()) == 5
    # of a version that averaged nothing there is alpha alone
    again.restore(0.25)
    assert again.plain() == [0.25]
    with pytest.raises(ValueError, match="numbers for alpha"):
        again.restore([0.25, 0.1])


def test_alpha_stays_in_its_bounds_where_nothing_can_be_routed():
    control = AlphaControl(EnsembleOptions(0.5, routing_entropy=0.5), 2)
    for _ in range(500):
        control.after_step(math.log(2), 0.0)  # members are one: no alpha has the entropy
    assert control.at(0) == 0.5
    for _ in range(200):
        control.after_step(0.0, 0.0)
    assert control.at(0) == pytest.approx(1e-6)
    # no wind-up: four steps turn the average over, however long alpha stood at its bound
    for _ in range(4):
        control.after_step(math.log(2), 0.0)
    assert control.at(0) == pytest.approx(1e-6 * math.exp(0.02))


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


def run(folder, steps=140, resume=None, stop=None, seed=0, adapter_dtype=None, **options):
    peft = pytest.importorskip("peft")
    from vifamily.llm._stacked import StackedCausalLM

    corpus = contradictory_sft(64, 16, torch.Generator().manual_seed(seed), length=2, num_symbols=4)
    tokenizer = tiny_tokenizer(corpus.texts, kind="word", vocab_size=64)
    base = tiny_base(dtype=torch.float32, vocab=len(tokenizer))
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear")
    model = StackedCausalLM(base, config, 2, seed=seed, adapter_dtype=adapter_dtype)
    trainer = quiet_trainer(
        model, folder, corpus, tokenizer, EnsembleOptions(micro_batch_rows=100, **options), stop=stop,
        max_steps=steps, per_device_train_batch_size=20, learning_rate=2e-2, lr_scheduler_type="constant",
        save_strategy="steps" if stop else "no", save_steps=3, seed=42 + seed,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def entropies(run):
    return [e["routing/entropy"] / math.log(2) for e in run.state.log_history if "loss" in e]


def test_members_of_one_alpha_share_nothing_in_the_end(tmp_path):
    assert sum(entropies(run(tmp_path, renyi_alpha=1.0))[-30:]) / 30 < 0.3


@pytest.mark.parametrize(
    ("seed", "path"),
    [
        (0, {}),
        (1, {}),
        (2, {"adapter_dtype": torch.float64}),  # not the fused product
        (3, {"route": "two_pass"}),
    ],
)
def test_the_entropy_is_reached_and_held_on_contradictory_answers(tmp_path, seed, path):
    done = run(tmp_path, seed=seed, renyi_alpha=1.0, renyi_alpha_start=1.0, routing_entropy=0.6, **path)
    found = entropies(done)
    assert len({round(e["renyi_alpha"], 6) for e in done.state.log_history if "loss" in e}) > 50
    for start in (50, 80, 110):
        # batches alone scatter it by some 0.08 a step
        assert sum(found[start : start + 30]) / 30 == pytest.approx(0.6, abs=0.06)


def test_resuming_a_held_alpha_is_exact_to_the_bit(tmp_path):
    options = {"renyi_alpha": 1.0, "renyi_alpha_start": 0.5, "routing_entropy": 0.6}
    whole = run(tmp_path / "whole", 6, **options)
    run(tmp_path / "cut", 6, stop=3, **options)
    again = run(tmp_path / "cut", 6, resume=True, **options)
    assert again._after_step.alpha.at(6) == whole._after_step.alpha.at(6) != 0.5
    pairs = zip(again._ensemble.adapter_parameters(), whole._ensemble.adapter_parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
