"""Small experiments that end in known numbers: ensembles of adapters on contradictory answers and preferences.

A base that has learned to copy, reverse and increment rows of symbols is tuned on a new task whose answers follow one
rule in half of the records and another in the rest. No member can be right about both; members that specialise are.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vifamily.diagnostics import Stability
from vifamily.diagnostics.routing import Responsibilities, mixture_log_score, responsibilities
from vifamily.llm._decode import log_prob_at
from vifamily.llm._extra import require
from vifamily.llm._routed import pair_margin
from vifamily.llm._stacked import StackedCausalLM, completion_rows
from vifamily.llm.corpora import Corpus, contradictory_pairs, contradictory_sft, ideal_nll, symbol_tasks
from vifamily.llm.critical import adapter_stability
from vifamily.llm.data import prepare_pairs, prepare_sft
from vifamily.llm.ensemble import Ensemble
from vifamily.llm.options import EnsembleOptions
from vifamily.llm.rows import collate_pairs, collate_sft
from vifamily.llm.stochastic import StochasticCausalLM
from vifamily.llm.tiny import pretrain, tiny_model, tiny_tokenizer
from vifamily.llm.uncertainty import split_uncertainty
from vifamily.numerics.soft_routing import power_value
from vifamily.rng import generator

__all__ = [
    "Base",
    "PairFigures",
    "Settings",
    "Specialisation",
    "conflict",
    "critical_alpha",
    "measure",
    "measure_pairs",
    "preferences",
    "symbol_base",
    "train",
]


@dataclasses.dataclass(frozen=True)
class Base:
    """A small base with its tokenizer.

    Attributes:
        model: Trained from scratch on three tasks.
        tokenizer: One token a word.
        exact: Share of held-out tasks that it answers exactly.
    """

    model: Any
    tokenizer: Any
    exact: float

    def ensemble(self, members: int, rank: int, seed: int, family: str = "points") -> StackedCausalLM:
        """Members with adapters on queries and values over a copy of the base, or draws of one such adapter."""
        config = require("peft", "an ensemble of adapters").LoraConfig(
            r=rank, lora_alpha=rank, target_modules=["q_proj", "v_proj"]
        )
        if family == "points":
            return StackedCausalLM(copy.deepcopy(self.model), config, members, seed=seed)
        return StochasticCausalLM(copy.deepcopy(self.model), config, members, family=family, seed=seed)


def symbol_base(
    *, steps: int = 600, hidden_size: int = 64, length: int = 6, seed: int = 0, say: Callable[[str], None] = print
) -> Base:
    """Train a two-layer base from scratch on copy, reverse and increment; no download.

    Args:
        steps: Steps of 64 rows; 600 are enough at length 6.
        hidden_size: Width.
        length: Symbols of a task.
        seed: Root seed.
        say: Called with a line on how it went.

    Returns:
        The base.
    """
    source = generator(seed, "llm/base")
    tasks = symbol_tasks(64 * min(steps, 400), source, length=length)
    tokenizer = tiny_tokenizer(["blend : =", *tasks.texts[:300]], kind="word", vocab_size=64)
    model = tiny_model(tokenizer, hidden_size=hidden_size, max_positions=64, seed=seed)
    went = pretrain(model, prepare_sft(list(tasks), tokenizer), steps=steps, generator=source, batch_size=64)
    held = prepare_sft(list(symbol_tasks(96, source, length=length)), tokenizer)
    # one member with adapters at zero is the base
    exact = _exact(Base(model, tokenizer, 0.0).ensemble(1, 1, 0), held, int(tokenizer.pad_token_id))
    say(f"base: {went}; {float(exact.double().mean()):.0%} of held-out tasks exact")
    return Base(model, tokenizer, float(exact.double().mean()))


@dataclasses.dataclass(frozen=True)
class Settings:
    """How an ensemble is trained.

    Attributes:
        alpha: Power of the routed likelihood.
        members: Number of members.
        rank: Rank of adapters on queries and values.
        steps: Steps of the optimiser.
        learning_rate: AdamW's, constant.
        batch_size: Rows of a step; groups where groups are routed.
        unit: What is routed.
        beta: DPO's inverse temperature.
        learn_weights: Whether weights of members are learned.
        ramp: Steps over which alpha rises from 0.01; 0 starts at alpha.
        warmup: Steps over which the step size rises.
        family: Members of their own ("points"), or draws of one adapter ("dropout", "mean_field").
        prior_weight: Weight of the prior per token; mean field needs it.
        seed: Root seed.
    """

    alpha: float
    members: int = 4
    rank: int = 2
    steps: int = 500
    learning_rate: float = 5e-3
    batch_size: int = 32
    unit: str = "sequence"
    beta: float = 0.5
    learn_weights: bool = False
    ramp: int = 0
    warmup: int = 0
    family: str = "points"
    prior_weight: float = 0.0
    seed: int = 0


def conflict(size: int = 2000, clean: int = 500, *, length: int = 6, share: float = 0.5, seed: int = 0) -> Corpus:
    """Answers to one task by two rules, among clean records of another."""
    return contradictory_sft(size, clean, generator(seed, "llm/conflict"), length=length, share=share)


def preferences(groups: int, size: int, *, length: int = 6, seed: int = 0) -> Corpus:
    """Preferences between the answers of two rules, with one sign for all pairs of a group."""
    return contradictory_pairs(groups, size, generator(seed, "llm/preferences"), length=length)


def train(base: Base, corpus: Corpus, settings: Settings) -> StackedCausalLM:
    """Train an ensemble on answers, or on preferences where the corpus has them.

    Args:
        base: The base; left as it is.
        corpus: What to train on.
        settings: How.

    Returns:
        The ensemble, in evaluation mode.
    """
    home = require("vifamily.llm.trainer", "training an ensemble")
    transformers = require("transformers", "training an ensemble")
    model = base.ensemble(settings.members, settings.rank, settings.seed, settings.family)
    pairs = "chosen" in corpus[0]
    options = EnsembleOptions(
        renyi_alpha=settings.alpha,
        renyi_alpha_start=min(0.01, settings.alpha) if settings.ramp else None,
        renyi_alpha_warmup_steps=settings.ramp,
        unit=settings.unit,
        group_column="group" if settings.unit == "group" else None,
        beta=settings.beta,
        learn_weights=settings.learn_weights,
        prior_weight=settings.prior_weight,
        micro_batch_rows=10_000,  # all at once: the model is small, and so is the memory
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=settings.warmup,
            weight_decay=0.0,
            seed=settings.seed,
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            use_cpu=not torch.cuda.is_available(),
        )
        maker = home.DPOEnsembleTrainer if pairs else home.SFTEnsembleTrainer
        trainer = maker(model, arguments, list(corpus), processing_class=base.tokenizer, options=options)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    if isinstance(model, StochasticCausalLM):
        model.redraw()
    return model.eval()


# --- measures ---


@dataclasses.dataclass(frozen=True)
class Specialisation:
    """How members share out contradictory answers; nats per held-out answer.

    Attributes:
        alpha: What it was trained at.
        mixture_nll: Of conflicting answers under the mixture.
        member_nll: Of the same under a member, on average.
        clean_nll: Of clean answers under the mixture.
        route_information: Of the member and the rule, over that of the rule: 0 shared, 1 told apart.
        conflicting_information: Of the member and the first token of an answer, on conflicting prompts.
        clean_information: The same on clean prompts.
        ideal: What the mixture's would be if members were perfect at the rules they lean to.
        exact: For each member, shares of conflicting prompts answered exactly by the one rule and by the other.
        routing: Who explains which answer, at power one.
    """

    alpha: float
    mixture_nll: float
    member_nll: float
    clean_nll: float
    route_information: float
    conflicting_information: float
    clean_information: float
    ideal: float
    exact: tuple[tuple[float, float], ...]
    routing: Responsibilities = dataclasses.field(repr=False)

    def plain(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("routing", "exact")}
        return out | {"exact": [list(pair) for pair in self.exact]}


@torch.no_grad()
def measure(model: StackedCausalLM, base: Base, held: Corpus, alpha: float) -> Specialisation:
    """Measure an ensemble on held-out answers, conflicting and clean.

    Args:
        model: The ensemble.
        base: What it stands on.
        held: Held-out records.
        alpha: What it was trained at, for the record.

    Returns:
        The figures.
    """
    rows = prepare_sft(list(held), base.tokenizer)
    pad, weight = int(base.tokenizer.pad_token_id), model.log_weight
    batch = collate_sft(rows.rows, pad)
    ll = model.row_log_prob(**batch).double()
    torn = torch.tensor([bool(record["conflicting"]) for record in held])
    score, clean = mixture_log_score(ll[:, torn], weight), mixture_log_score(ll[:, ~torn], weight)
    rules = [record["rule"] for record, apart in zip(held, torn.tolist(), strict=True) if apart]
    names = list(dict.fromkeys(rules))
    routed = responsibilities(ll[:, torn], weight, 1.0, unit="answer")  # one power for all, whatever trained
    first = split_uncertainty(Ensemble(model).next_log_prob(list(rows)), weight).epistemic
    exact = _exact(model, rows, pad)
    said = [exact[:, torn][:, torch.tensor([rule == name for rule in rules])].double().mean(1) for name in names]
    leans = torch.stack([ll[:, torn][:, torch.tensor([r == n for r in rules])].mean(1) for n in names]).argmax(0)
    shares = [rules.count(name) / len(rules) for name in names]
    held_by = [float(weight.exp()[leans == i].sum()) for i in range(len(names))]
    return Specialisation(
        alpha,
        -score.mixture_mean,
        -score.member_mean,
        -clean.mixture_mean,
        routed.route_information(rules) / _entropy(shares),
        float(first[torn].mean()),
        float(first[~torn].mean()),
        ideal_nll(shares, [h / sum(held_by) for h in held_by]),
        tuple((float(a), float(b)) for a, b in zip(said[0], said[-1], strict=True)),
        routed,
    )


@dataclasses.dataclass(frozen=True)
class PairFigures:
    """How members share out contradictory preferences.

    Attributes:
        alpha: What it was trained at.
        size: Pairs of a group.
        mixture_nll: Nats a pair, of held-out groups under the mixture.
        route_information: Of the member and the group's sign, over that of the sign.
        margins: Mean margin of each member for the first rule over the second.
        accuracy: Share of held-out pairs predicted by members weighted by the other pairs of their group.
    """

    alpha: float
    size: int
    mixture_nll: float
    route_information: float
    margins: tuple[float, ...]
    accuracy: float

    def plain(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        return dataclasses.asdict(self) | {"margins": list(self.margins)}


@torch.no_grad()
def measure_pairs(model: StackedCausalLM, base: Base, held: Corpus, settings: Settings) -> PairFigures:
    """Measure an ensemble on held-out groups of preferences.

    Args:
        model: The ensemble.
        base: What it stands on.
        held: Held-out records, groups of one size.
        settings: How it was trained.

    Returns:
        The figures.
    """
    rows = prepare_pairs(list(held), base.tokenizer, group_column="group")
    batch = collate_pairs(rows.rows, int(base.tokenizer.pad_token_id))
    ours, reference = model.row_log_prob(**batch).double(), model.row_log_prob(**batch, adapters=False).double()[0]
    margin = settings.beta * pair_margin(ours, reference)
    size = len(rows) // len(rows.groups)
    a = torch.nn.functional.logsigmoid(margin).unflatten(1, (-1, size))  # groups stand one after the other
    grouped, weight = a.sum(-1), model.log_weight
    rules = [rows_of[0] for rows_of in _chunks([record["rule"] for record in held], size)]
    shares = [rules.count(rule) / len(rules) for rule in dict.fromkeys(rules)]
    routed = responsibilities(grouped, weight, 1.0, unit="group")
    sign = torch.tensor([1.0 if record["rule"] == "copy" else -1.0 for record in held], dtype=torch.float64)
    # each pair is predicted by members weighted by the other pairs of its group
    others = (grouped.unsqueeze(-1) - a + weight[:, None, None]).log_softmax(0)
    predicted = torch.logsumexp(others + a, 0).exp()
    return PairFigures(
        settings.alpha,
        size,
        float(power_value(grouped, weight, 1.0).mean()) / size,
        routed.route_information(rules) / _entropy(shares),
        tuple((margin / settings.beta * sign).mean(1).tolist()),
        float((predicted > 0.5).double().mean()),
    )


def _entropy(shares: Sequence[float]) -> float:
    return -math.fsum(s * math.log(s) for s in shares if s)


def _chunks(values: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [values[i : i + size] for i in range(0, len(values), size)]


@torch.no_grad()
def _exact(model: StackedCausalLM, rows: Sequence[Any], pad: int) -> Tensor:
    """Whether each token of an answer is the member's likeliest, given the answer so far, ``(member, row)``.

    That is whether the member's greedy answer is the row's.
    """
    batch = collate_sft(list(rows), pad)
    best = log_prob_at(model, batch, (0, model.num_members)).argmax(-1)
    hit = best == batch["input_ids"][:, 1:][batch["completion_mask"][:, 1:]]
    row = completion_rows(batch["completion_mask"])
    missed = torch.zeros(model.num_members, len(batch["input_ids"]), dtype=torch.long)
    return missed.index_add(1, row, (~hit).long()) == 0


def critical_alpha(
    base: Base, corpus: Corpus, settings: Settings, *, units: int = 96, num_label_draws: int | None = 16
) -> Stability:
    """Predict where an ensemble starts to specialise, at one member trained alone.

    Args:
        base: What it stands on.
        corpus: Answers.
        settings: How the member is trained; its alpha and number of members do not matter.
        units: Answers that are looked at.
        num_label_draws: See :func:`~vifamily.llm.critical.adapter_stability`.

    Returns:
        The analysis; its ``alpha_star`` is the prediction, with a sweep over dampings.
    """
    model = train(base, corpus, dataclasses.replace(settings, alpha=0.0, members=1, ramp=0))
    rows = prepare_sft(list(corpus)[:units], base.tokenizer)
    source = generator(settings.seed, "llm/labels")
    return adapter_stability(
        model, rows.rows, generator=source, num_label_draws=num_label_draws, search=False, seed=settings.seed
    )
