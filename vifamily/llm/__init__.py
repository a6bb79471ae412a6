"""Ensembles of LoRA adapters for language models.

Everything here that needs transformers, peft or tokenizers imports them when it is used. They come with
``pip install "vifamily[llm]"``.
"""

from __future__ import annotations

from vifamily.llm._stacked import StackedCausalLM, StackedLoRA
from vifamily.llm.data import check_tokenizer, prepare_pairs, prepare_sft
from vifamily.llm.manifest import Manifest, read_manifest
from vifamily.llm.reading import read_records
from vifamily.llm.rows import PairRow, Row, Rows, collate_pairs, collate_sft
from vifamily.llm.saving import export_merged, load_members, load_model, save_members

__all__ = [
    "Manifest",
    "PairRow",
    "Row",
    "Rows",
    "StackedCausalLM",
    "StackedLoRA",
    "check_tokenizer",
    "collate_pairs",
    "collate_sft",
    "export_merged",
    "load_members",
    "load_model",
    "prepare_pairs",
    "prepare_sft",
    "read_manifest",
    "read_records",
    "save_members",
]
