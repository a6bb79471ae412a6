"""What soft specialists are compared with: one adapter, independent members, and one adapter with a distribution."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from vifamily.llm import specialists as lab
from vifamily.llm._stacked import StackedCausalLM
from vifamily.llm.calibration import auroc, score_probabilities
from vifamily.llm.corpora import Corpus
from vifamily.llm.data import prepare_sft
from vifamily.llm.ensemble import Ensemble
from vifamily.llm.laplace import adapter_laplace
from vifamily.llm.specialists import Base, Settings
from vifamily.llm.uncertainty import split_uncertainty
from vifamily.reproduce._report import Claim
from vifamily.rng import generator

__all__ = ["INDEPENDENT", "SOFT", "Baseline", "baseline_claims", "baselines", "compare"]

INDEPENDENT, SOFT = "independent members, alpha 0", "soft specialists, alpha 0.8"


@dataclasses.dataclass(frozen=True)
class Baseline:
    """How one way of being uncertain does on held-out answers.

    Attributes:
        name: Which.
        mixture_nll: Nats per conflicting answer under the mixture.
        clean_nll: Nats per clean answer.
        conflicting_information: Of the member and the first token of an answer, on conflicting prompts.
        clean_information: The same on clean prompts.
        auroc_epistemic: Probability that a conflicting prompt has the larger information than a clean one.
        auroc_total: The same of the entropy of the mixture's first token.
        ece: Expected calibration error of the first token over all prompts, 15 bins of one width.
    """

    name: str
    mixture_nll: float
    clean_nll: float
    conflicting_information: float
    clean_information: float
    auroc_epistemic: float
    auroc_total: float
    ece: float

    def plain(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        return dataclasses.asdict(self)


@torch.no_grad()
def compare(name: str, model: StackedCausalLM, base: Base, held: Corpus) -> Baseline:
    """Measure members or draws on held-out answers.

    Args:
        name: What it is called.
        model: The members.
        base: What they stand on.
        held: Held-out records, conflicting and clean.

    Returns:
        The figures.
    """
    rows = prepare_sft(list(held), base.tokenizer).rows
    ensemble = Ensemble(model, base.tokenizer)
    torn = torch.tensor([bool(record["conflicting"]) for record in held])
    ll, weight = ensemble.log_likelihood(rows), ensemble.log_weight
    nll = -torch.logsumexp(ll + weight[:, None], 0)
    first = ensemble.next_log_prob(rows)
    parts = split_uncertainty(first, weight)
    mixture = torch.logsumexp(first + weight[:, None, None], 0).exp()
    said = torch.tensor([row.completion_ids[0] for row in rows])
    return Baseline(
        name,
        float(nll[torn].mean()),
        float(nll[~torn].mean()),
        float(parts.epistemic[torn].mean()),
        float(parts.epistemic[~torn].mean()),
        auroc(parts.epistemic, torn),
        auroc(parts.total, torn),
        score_probabilities(mixture, said).ece,
    )


def baselines(
    base: Base, corpus: Corpus, held: Corpus, settings: Settings, say: Callable[[str], None] = print
) -> list[Baseline]:
    """Train each baseline of one adapter once, with the data, steps and rank of the ensemble, and measure it.

    Args:
        base: What all stand on.
        corpus: What they are trained on.
        held: Held-out records.
        settings: Those of the ensemble.
        say: Called with a line for each.

    Returns:
        A single adapter, dropout, mean field and Laplace's approximation at the single adapter.
    """
    rows = prepare_sft(list(corpus), base.tokenizer).rows
    tokens = sum(sum(row.scored) for row in rows)
    plain = dataclasses.replace(settings, alpha=0.0, ramp=0)
    found: list[Baseline] = []

    def add(name: str, model: StackedCausalLM) -> None:
        found.append(compare(name, model, base, held))
        one = found[-1]
        say(
            f"{name}: mixture {one.mixture_nll:.3f}, information {one.conflicting_information:.3f} conflicting, "
            f"{one.clean_information:.4f} clean, AUROC {one.auroc_epistemic:.2f}"
        )

    single = lab.train(base, corpus, dataclasses.replace(plain, members=1))
    add("single adapter", single)
    add("Monte-Carlo dropout 0.1", lab.train(base, corpus, dataclasses.replace(plain, family="dropout")))
    mean_field = dataclasses.replace(plain, family="mean_field", prior_weight=1.0 / tokens)
    add("mean field", lab.train(base, corpus, mean_field))
    source = generator(settings.seed, "llm/laplace")
    adapter_laplace(single, rows, generator=source).draw_members(single, settings.members, generator=source)
    add("Laplace, diagonal", single)
    return found


def baseline_claims(found: list[Baseline]) -> list[Claim]:
    """Return what the comparison says."""
    soft = next(b for b in found if b.name == SOFT)
    others = [b for b in found if b.name != SOFT]
    best = min(others, key=lambda b: b.mixture_nll)
    torn = max(others, key=lambda b: b.conflicting_information)
    return [
        Claim(
            "No baseline's mixture comes within 1 nat of the soft specialists' on contradictory answers",
            None, f"{best.mixture_nll:.3f} ({best.name}) against {soft.mixture_nll:.3f}", None,
            best.mixture_nll > soft.mixture_nll + 1.0, "one adapter, independent members, dropout, mean field, Laplace",
        ),
        Claim(
            "Members of no baseline disagree half as much on the first token of conflicting prompts",
            None, f"{torn.conflicting_information:.3f} ({torn.name}) against {soft.conflicting_information:.3f}", None,
            torn.conflicting_information < soft.conflicting_information / 2, "nats of information",
        ),
    ]  # fmt: skip
