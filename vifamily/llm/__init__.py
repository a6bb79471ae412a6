"""Ensembles of LoRA adapters for language models.

Everything here that needs transformers, peft or tokenizers imports them when it is used. They come with
``pip install "vifamily[llm]"``.
"""

from __future__ import annotations

from vifamily.llm._layers import StackedLoRA
from vifamily.llm._stacked import StackedCausalLM
from vifamily.llm.adapter_files import start_from_adapter
from vifamily.llm.calibration import CalibrationReport, RiskCoverage, auroc, risk_coverage, score_probabilities
from vifamily.llm.corpora import (
    Corpus,
    as_conversations,
    contradictory_pairs,
    contradictory_sft,
    ideal_nll,
    symbol_tasks,
)
from vifamily.llm.cost import StepCost, step_cost
from vifamily.llm.critical import adapter_stability
from vifamily.llm.data import check_tokenizer, prepare_pairs, prepare_sft, prompt_ids
from vifamily.llm.ensemble import Answer, Ensemble
from vifamily.llm.laplace import AdapterLaplace, adapter_laplace
from vifamily.llm.manifest import Manifest, read_manifest
from vifamily.llm.options import EnsembleOptions
from vifamily.llm.reading import read_records
from vifamily.llm.rows import PairRow, Row, Rows, collate_pairs, collate_sft
from vifamily.llm.saving import export_lora, export_merged, load_members, load_model, save_members
from vifamily.llm.sharding import shard_base
from vifamily.llm.sizes import BaseSize, base_size
from vifamily.llm.stochastic import StochasticCausalLM
from vifamily.llm.styles import annotators, styled_facts
from vifamily.llm.tiny import (
    Pretrained,
    answer_log_likelihood,
    greedy_answers,
    pretrain,
    save_base,
    tiny_model,
    tiny_tokenizer,
)
from vifamily.llm.uncertainty import (
    Behaviour,
    SequenceInformation,
    Uncertainty,
    answer_clusters,
    behaviour,
    posterior_log_weight,
    sequence_information,
    split_uncertainty,
    split_uncertainty_along,
)
from vifamily.llm.walsh import StackedWalsh, WalshCausalLM, WalshConfig

__all__ = [
    "AdapterLaplace",
    "Answer",
    "BaseSize",
    "Behaviour",
    "CalibrationReport",
    "Corpus",
    "Ensemble",
    "EnsembleOptions",
    "Manifest",
    "PairRow",
    "Pretrained",
    "RiskCoverage",
    "Row",
    "Rows",
    "SequenceInformation",
    "StackedCausalLM",
    "StackedLoRA",
    "StackedWalsh",
    "StepCost",
    "StochasticCausalLM",
    "Uncertainty",
    "WalshCausalLM",
    "WalshConfig",
    "adapter_laplace",
    "adapter_stability",
    "annotators",
    "answer_clusters",
    "answer_log_likelihood",
    "as_conversations",
    "auroc",
    "base_size",
    "behaviour",
    "check_tokenizer",
    "collate_pairs",
    "collate_sft",
    "contradictory_pairs",
    "contradictory_sft",
    "export_lora",
    "export_merged",
    "greedy_answers",
    "ideal_nll",
    "load_members",
    "load_model",
    "posterior_log_weight",
    "prepare_pairs",
    "prepare_sft",
    "pretrain",
    "prompt_ids",
    "read_manifest",
    "read_records",
    "risk_coverage",
    "save_base",
    "save_members",
    "score_probabilities",
    "sequence_information",
    "shard_base",
    "split_uncertainty",
    "split_uncertainty_along",
    "start_from_adapter",
    "step_cost",
    "styled_facts",
    "symbol_tasks",
    "tiny_model",
    "tiny_tokenizer",
]
