"""Using a model: load it, continue text, chat. Never imports training."""

from moai_llm.inference.engine import Engine, Event, Request
from moai_llm.inference.generate import generate, sample_text
from moai_llm.inference.load import TextModel, load_model, resolve_model
from moai_llm.inference.sampling import Sampling
from moai_llm.inference.session import Session

__all__ = [
    "Engine", "Event", "Request", "Sampling", "Session", "TextModel", "generate", "load_model", "resolve_model",
    "sample_text",
]  # fmt: skip
