"""Tokenizers: train one, load one, turn conversations into tokens. Knows nothing of models and data sets."""

from moai_llm.tokenizer.load import Tokenizer, load_tokenizer

__all__ = ["Tokenizer", "load_tokenizer"]
