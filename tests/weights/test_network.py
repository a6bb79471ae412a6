"""Networks as functions of input and latent: every route gives what one call per draw gives."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

from vifamily import errors, rng
from vifamily.testing._tools import seeded
from vifamily.weights import NetworkWeights, convert
from vifamily.weights._fold import FoldedNet
from vifamily.weights.dense import Dense

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")  # attention without gradients


@pytest.fixture(autouse=True)
def own_stream():
    """Layers draw their first weights from torch's stream."""
    with rng.scoped(0):
        yield


def initialised(net, seed=0):
    """The net in float64 with weights from a generator."""
    source = seeded(seed)
    net = net.double()
    with torch.no_grad():
        for parameter in net.parameters():
            noise = torch.randn(parameter.shape, generator=source, dtype=torch.float64)
            parameter.copy_(0.5 * noise)
    return net


class Residual(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.inner, self.out = nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, x):
        return self.out(x + torch.tanh(self.inner(x)))


class Mixing(nn.Module):
    """Takes the mean over rows of a hidden layer: what one draw gives depends on all rows."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x):
        hidden = self.inner(x)
        return self.out(hidden - hidden.mean(0))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        mixed, _ = self.attention(x, x, x, need_weights=False)
        return self.out(mixed.mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x):
        hidden, _ = self.inner(x)
        return self.out(hidden[:, -1])


class Bare(nn.Module):
    """Holds a parameter of its own beside a layer."""

    def __init__(self):
        super().__init__()
        self.shift, self.layer = nn.Parameter(torch.zeros(4)), nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(torch.tanh(x + self.shift))


class Tokens(nn.Module):
    """Folds its time axis into the rows by itself."""

    def __init__(self):
        super().__init__()
        self.embed, self.layer = nn.Embedding(7, 3), nn.Linear(3, 2)

    def forward(self, x):
        flat = self.layer(self.embed(x).reshape(-1, 3))
        return flat.reshape(*x.shape, 2).mean(1)


class Branching(nn.Module):
    """Looks at values, which no vectorised form can."""

    def __init__(self):
        super().__init__()
        self.shift, self.layer = nn.Parameter(torch.zeros(4)), nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(x + self.shift) if self.shift.sum() > 0 else -self.layer(x)


def rows(*shape):
    return torch.randn(shape, generator=seeded(5), dtype=torch.float64)


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Sequential(nn.Linear(5, 3), nn.Tanh()), nn.Linear(3, 2))


def normed():
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 2))


def convolutional():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2, groups=2),
        nn.Flatten(), nn.Linear(6 * 4, 3),
    )  # fmt: skip


def others():
    return nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.PReLU(4), nn.Conv1d(4, 4, 2, padding=1, padding_mode="circular"), nn.GroupNorm(2, 4),
        nn.ConvTranspose1d(4, 2, 2), nn.Flatten(), nn.LazyLinear(2),
    )  # fmt: skip


CASES = {
    "mlp": (mlp, lambda: rows(7, 4), "fold"),
    "sequence": (mlp, lambda: rows(7, 3, 4), "fold"),
    "one layer": (lambda: nn.Linear(4, 2), lambda: rows(6, 4), "fold"),
    "layer norm": (normed, lambda: rows(6, 4), "fold"),
    "convolutions": (convolutional, lambda: rows(6, 2, 6, 6), "fold"),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(9, 3), nn.Flatten(), nn.Linear(6, 2)),
        lambda: torch.randint(9, (6, 2), generator=seeded(1)),
        "fold",
    ),
    "residual": (Residual, lambda: rows(6, 4), "repeat"),
    "rows of its own": (Tokens, lambda: torch.randint(7, (6, 3), generator=seeded(1)), "repeat"),
    "mixes rows": (Mixing, lambda: rows(6, 4), "vmap"),
    "attention": (Attention, lambda: rows(6, 3, 4), "vmap"),
    "parameter of its own": (Bare, lambda: rows(6, 4), "vmap"),
    "branches": (Branching, lambda: rows(6, 4), "loop"),
}


def by_hand(made, net, x, z):
    """One call of a copy of the original net for every draw, with the parameters written into it."""
    out = []
    for s in range(z.shape[0]):
        values = {name: value[s] for name, value in made.materialise(z).items()}
        out.append(functional_call(copy.deepcopy(net).eval(), values, (x,)))
    return torch.stack(out)


@pytest.mark.parametrize("case", CASES)
def test_all_draws_at_once_are_one_call_per_draw(case):
    build, data, route = CASES[case]
    net, x = initialised(build()), data()
    made = convert(net, "dense")
    z = torch.randn(3, made.dim, generator=seeded(2), dtype=torch.float64)
    expected = by_hand(made, net, x, z)
    torch.testing.assert_close(made(x, z), expected, rtol=1e-10, atol=1e-10)
    assert made.route == route, made.declined
    torch.testing.assert_close(made(x[:1], z), by_hand(made, net, x[:1], z), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(made(x, z[:1]), expected[:1], rtol=1e-10, atol=1e-10)
    made.chunk_draws = 2
    torch.testing.assert_close(made(x, z), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", ["mlp", "convolutions", "layer norm", "embedding", "residual", "attention"])
def test_the_whole_net_vectorised_is_one_call_per_draw(case):
    build, data, _ = CASES[case]
    net, x = initialised(build()), data()
    made = convert(net, "dense")
    z = torch.randn(3, made.dim, generator=seeded(2), dtype=torch.float64)
    torch.testing.assert_close(made.evaluate("vmap", x, z), by_hand(made, net, x, z), rtol=1e-10, atol=1e-10)


def test_recurrent_net_is_evaluated_by_some_route():
    net, x = initialised(Recurrent()), rows(6, 5, 3)
    made = convert(net)
    z = torch.randn(3, made.dim, generator=seeded(2), dtype=torch.float64)
    torch.testing.assert_close(made(x, z), by_hand(made, net, x, z), rtol=1e-10, atol=1e-10)
    assert made.route in ("vmap", "loop")


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.3, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(4, 1)

    def forward(self, x):
        return self.out(self.encoder(x).mean(1))


@pytest.mark.parametrize("build", [Attention, Transformer])
def test_attention_has_gradients(build):
    net, x = initialised(build()), rows(5, 3, 4)
    made = convert(net).train()
    z = 0.3 * torch.randn(2, made.dim, generator=seeded(2), dtype=torch.float64)
    torch.testing.assert_close(made(x, z), by_hand(made, net, x, z), rtol=1e-9, atol=1e-9)
    assert made.route == "vmap", made.declined
    at = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(made(x, at).sum(), [at])
    direction, h = torch.randn(z.shape, generator=seeded(3), dtype=torch.float64), 1e-6
    slope = (made(x, z + h * direction) - made(x, z - h * direction)).sum() / (2 * h)
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-5, atol=1e-7)


def test_other_layers():
    net = others()
    net(torch.zeros(2, 2, 8))  # the lazy layer takes its size
    net, x = initialised(net), rows(6, 2, 8)
    made = convert(net)
    z = torch.randn(3, made.dim, generator=seeded(2), dtype=torch.float64)
    torch.testing.assert_close(made(x, z), by_hand(made, net, x, z), rtol=1e-10, atol=1e-10)
    assert made.route == "fold", made.declined


@pytest.mark.parametrize(
    "case", ["mlp", "sequence", "one layer", "layer norm", "convolutions", "embedding", "residual"]
)
def test_a_latent_for_each_datum_is_one_call_per_datum(case):
    build, data, _ = CASES[case]
    net, x = initialised(build()), data()
    made = convert(net, "dense")
    z = torch.randn(3, x.shape[0], made.dim, generator=seeded(2), dtype=torch.float64)
    expected = torch.cat([by_hand(made, net, x[i : i + 1], z[:, i]) for i in range(x.shape[0])], 1)
    torch.testing.assert_close(made(x, z), expected, rtol=1e-10, atol=1e-10)
    assert made.example_noise


def test_gradient_agrees_with_differences():
    made = convert(initialised(normed()))
    x = rows(5, 4)
    z = torch.randn(2, made.dim, generator=seeded(2), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: made(x, v), (z,))


# --- routes ---


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("case", ["residual", "mixes rows"])
def test_route_found_on_a_few_rows_holds_for_many(case, count):
    build, data, route = CASES[case]
    made = convert(initialised(build()))
    assert made.settle(data()[:count]) == route


def test_nan_is_an_error_and_not_a_slow_route():
    made = convert(nn.Sequential(nn.Linear(2, 3), nn.LogSigmoid(), nn.Linear(3, 1)))
    with pytest.raises(errors.ModelError, match="NaN or infinite"):
        made.settle(torch.full((4, 2), math.inf))


def test_out_of_memory_is_not_taken_for_a_refusal(monkeypatch):
    made = convert(mlp())

    def full(*args, **options):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(FoldedNet, "__call__", full)
    with pytest.raises(torch.OutOfMemoryError):
        made(torch.ones(4, 4), torch.zeros(2, made.dim))


def test_random_network_is_refused():
    class Noisy(nn.Sequential):
        def forward(self, x):
            return super().forward(x) + torch.rand(())

    made = convert(Noisy(nn.Linear(2, 1)))
    before = torch.get_rng_state()
    with pytest.raises(errors.ModelError, match="each time"):
        made.settle(torch.ones(4, 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_net_that_raises_is_named():
    made = convert(nn.Linear(2, 1))
    with pytest.raises(errors.ModelError, match=r"\(5, 3\)"):
        made.settle(torch.ones(6, 3))


def test_a_net_that_loses_its_rows_is_refused():
    class Sum(nn.Sequential):
        def forward(self, x):
            return super().forward(x).sum()

    with pytest.raises(errors.ShapeError, match="datum"):
        convert(Sum(nn.Linear(2, 1))).settle(torch.ones(6, 2))


# --- what stays ---


def test_batch_normalisation_keeps_its_statistics_and_dropout_is_off():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    net(torch.randn(20, 3, generator=seeded(0)))  # statistics unlike those of a new layer
    made = convert(net).train()
    before = {key: value.clone() for key, value in made.net.named_buffers()}
    z = torch.randn(2, made.dim, generator=seeded(1))
    out = made(torch.randn(8, 3, generator=seeded(2)), z)
    after = dict(made.net.named_buffers())
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert torch.equal(out, made(torch.randn(8, 3, generator=seeded(2)), z))
    assert "batch normalisation" in made.report.skipped["1"]
    assert net.training


def test_batch_statistics_in_eval_mode_are_refused():
    with pytest.raises(errors.ConfigError, match="track_running_stats"):
        convert(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)))


def test_shared_parameters_stay_points():
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), nn.Linear(3, 1))
    net[1].weight = net[0].weight
    made = convert(net)
    assert made.report.converted == {"2": 4}
    assert "shares" in made.report.skipped["0"]
    assert [p.shape for p in made.parameters() if p.requires_grad] == [(3, 3)]


@pytest.mark.parametrize("rest", ["point", "frozen"])
def test_rest(rest):
    net = mlp()
    made = convert(net, include="*.weight", rest=rest)
    biases = 5 + 3 + 2
    points = [p for p in made.parameters() if p.requires_grad]
    assert made.report.point == sum(p.numel() for p in points) == (biases if rest == "point" else 0)
    assert made.report.latent == made.dim == 4 * 5 + 5 * 3 + 3 * 2
    x, z = torch.ones(4, 4), torch.ones(2, made.dim)
    out = made(x, z)
    if points:
        gradients = torch.autograd.grad(out.sum(), points)
        assert any(bool(g.any()) for g in gradients)


def test_points_trained_after_a_call_are_seen_by_the_next():
    made = convert(mlp(), include="*.weight")
    x, z = torch.ones(4, 4), torch.ones(2, made.dim)
    before = made(x, z)
    with torch.no_grad():
        list(made.parameters())[-1].add_(1.0)
    torch.testing.assert_close(made(x, z), before + 1)
    moved = copy.deepcopy(made).double()
    torch.testing.assert_close(moved(x.double(), z.double()), made(x, z).double())


# --- reports and arguments ---


def test_report_counts_and_prints():
    net = convolutional()
    made = convert(net, exclude="3.*")
    assert made.report.parameters == sum(p.numel() for p in net.parameters())
    assert made.report.converted == {"0": 2 * 4 * 9 + 4, "5": 24 * 3 + 3}
    assert made.report.skipped.keys() == {"1", "3"}
    lines = str(made.report).splitlines()
    assert lines[0].split() == ["layer", "kind", "parameters", "latent"]
    assert "statistics fixed" in lines[-1]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rest": "drop"}, "rest"),
        ({"prior_scale": 0.0}, "prior_scale"),
        ({"prior_scale": True}, "prior_scale"),
        ({"include": "nothing"}, "nothing|no layer"),
        ({"weights": "dense(begin=best)"}, "begin"),
        ({"weights": "lora(rank=0)"}, "rank"),
        ({"weights": "lora(scale=-1)"}, "scale"),
        ({"weights": "lora(scale=big)"}, "scale"),
        ({"include": 3}, "include"),
        ({"weights": "walsh_hadamard(exclude=3)"}, "exclude"),
        ({"weights": "subset(pattern=3)"}, "pattern"),
        ({"weights": 3}, "entry"),
    ],
)
def test_arguments_are_checked(options, match):
    with pytest.raises(errors.ConfigError, match=match):
        convert(mlp(), **options)


def test_chunk_and_kind_are_checked():
    with pytest.raises(errors.ConfigError, match="chunk_draws"):
        Dense().build(mlp(), generator=seeded(0), chunk_draws=0)
    with pytest.raises(errors.ConfigError, match="Module"):
        convert(lambda x: x)
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    with pytest.raises(errors.ConfigError, match="dtype"):
        convert(mixed)


# --- prior ---


def test_prior_and_cross_entropy_are_those_of_independent_normals():
    made = convert(initialised(mlp()), prior_scale=2.0)
    mean, sd = made.prior()
    normal = torch.distributions.Normal(mean, sd)
    z = torch.randn(4, made.dim, generator=seeded(0), dtype=torch.float64)
    torch.testing.assert_close(made.log_prior(z), normal.log_prob(z).sum(-1), rtol=1e-12, atol=1e-10)
    other = torch.distributions.Normal(z, 0.3 + z.square())
    expected = (torch.distributions.kl_divergence(other, normal) + other.entropy()).sum(-1)
    torch.testing.assert_close(made.cross_entropy(z, other.variance), expected, rtol=1e-12, atol=1e-10)
    assert made.gaussian_prior


def test_parameters_exchanged_by_name_are_put_back():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    for spec in ("dense", "walsh_hadamard"):
        made = convert(net, spec, include="*.weight")
        x, z = torch.ones(2, 3, dtype=torch.float64), torch.ones(1, made.dim, dtype=torch.float64)
        own = {name: p for name, p in made.named_parameters() if p.requires_grad}
        other = {name: p.detach() + 1 for name, p in own.items()}
        before = made(x, z).detach()
        assert not torch.allclose(functional_call(made, other, (x, z)), before)
        torch.testing.assert_close(made(x, z), before)
        after = dict(made.named_parameters())
        assert all(after[name] is p for name, p in own.items())
        again = copy.deepcopy(made)
        with torch.no_grad():
            dict(again.named_parameters())["net.2.bias"].add_(1)
        torch.testing.assert_close(again(x, z), before + 1)


def test_fitted_prior_is_the_best_scale():
    made = convert(initialised(mlp()))
    source = seeded(3)
    mean = torch.randn(made.dim, generator=source, dtype=torch.float64)
    variance = torch.rand(made.dim, generator=source, dtype=torch.float64)
    before = made.cross_entropy(mean, variance)
    found = made.fit_prior(mean, variance)
    best = made.cross_entropy(mean, variance)
    assert set(found) == {"0", "2.0", "3"}
    assert best < before
    for layer in range(3):
        for factor in (0.98, 1.02):
            made.scales[layer] *= factor
            assert made.cross_entropy(mean, variance) > best
            made.scales[layer] /= factor
    weights = made.prior()[1][:20]  # the first layer's, of fan-in 4
    torch.testing.assert_close(weights, torch.full_like(weights, found["0"] * math.sqrt(0.5)))


def test_outputs_keep_their_size_under_the_prior(seed):
    width, draws = 80, 400
    net = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
    made = convert(net.double(), exclude="*.bias", rest="frozen")
    for name, buffer in made.net.named_buffers():
        if name.endswith("bias"):
            buffer.zero_()
    mean, sd = made.prior()
    noise = torch.randn(draws, made.dim, generator=rng.generator(seed, "prior"), dtype=torch.float64)
    x = torch.ones(1, width, dtype=torch.float64)
    with torch.no_grad():
        out = made(x, mean + sd * noise).flatten()
    square = out.square()  # its mean is 2 with inputs of unit mean square
    assert abs(float(square.mean()) - 2) < 5 * float(square.std()) / math.sqrt(draws)


def test_type_is_public():
    assert isinstance(convert(mlp()), NetworkWeights)


@pytest.mark.parametrize("spec", ["dense(exclude='2.*')", "walsh_hadamard"])
def test_points_are_exchanged_with_the_tensors_of_the_net(spec, seed):
    """Restarts and compiled steps hand over parameters by functional_call; layers that stay as they are must see it."""
    with rng.scoped(seed):
        net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    weights = convert(net, spec, seed=seed)
    x = torch.randn(6, 3, generator=rng.generator(seed, "x"), dtype=torch.float64)
    z = torch.randn(4, weights.dim, generator=rng.generator(seed, "z"), dtype=torch.float64)
    assert weights.settle(x) == "fold"
    own = {name: p for name, p in weights.named_parameters() if p.requires_grad}
    others = {name: (p.detach() + 0.3).requires_grad_() for name, p in own.items()}
    got = torch.func.functional_call(weights, others, (x, z))
    assert all(g is not None for g in torch.autograd.grad(got.sum(), list(others.values()), allow_unused=True))
    with torch.no_grad():
        for p in own.values():
            p.add_(0.3)
        torch.testing.assert_close(weights(x, z), got.detach())
