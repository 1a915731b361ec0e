"""Using a model: load it, continue text, chat. Never imports training."""

from moai_llm.inference.generate import Sampling, Session, TextModel, load_model, resolve_model, sample_text

__all__ = ["Sampling", "Session", "TextModel", "load_model", "resolve_model", "sample_text"]
