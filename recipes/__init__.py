"""Small data and model modules that the YAML recipes name, and a text corpus that needs no download.

They are examples to run and to copy. Commands that read text (`evaluate`, `compare`, ...) do so through the data
modules; nothing else in the package depends on them.
"""

from moe_precision.recipes.causal_lm import CausalLM
from moe_precision.recipes.seq2seq_data import SummarizationDataModule
from moe_precision.recipes.seq2seq_lm import Seq2SeqLM
from moe_precision.recipes.text_data import TextDataModule

__all__ = ["CausalLM", "Seq2SeqLM", "SummarizationDataModule", "TextDataModule"]
