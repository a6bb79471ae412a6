"""Ensembles of LoRA adapters for language models.

Everything here that needs transformers, peft or tokenizers imports them when it is used. They come with
``pip install "vifamily[llm]"``.
"""

from __future__ import annotations

from vifamily.llm.data import check_tokenizer, prepare_pairs, prepare_sft
from vifamily.llm.reading import read_records
from vifamily.llm.rows import PairRow, Row, Rows, collate_pairs, collate_sft

__all__ = [
    "PairRow",
    "Row",
    "Rows",
    "check_tokenizer",
    "collate_pairs",
    "collate_sft",
    "prepare_pairs",
    "prepare_sft",
    "read_records",
]
