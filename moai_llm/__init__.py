"""MOAI-LLM: raw text to a language model that chats, on one machine.

The public names are imported on first use, so that `import moai_llm` imports neither torch nor transformers. Where
transformers is imported as well, before or after, its Auto classes know our models.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "MoaiConfig": "moai_llm.config",
    "MoaiForCausalLM": "moai_llm.modeling.model",
    "MoaiModel": "moai_llm.modeling.model",
    "get_config": "moai_llm.recipe",
    "get_mamba_config": "moai_llm.recipe",
    "list_recipes": "moai_llm.recipe",
    "load_model": "moai_llm.inference",
    "load_tokenizer": "moai_llm.tokenizer",
    "sample_text": "moai_llm.inference",
}

__all__ = [
    "MoaiConfig",
    "MoaiForCausalLM",
    "MoaiModel",
    "__version__",
    "get_config",
    "get_mamba_config",
    "list_recipes",
    "load_model",
    "load_tokenizer",
    "sample_text",
]

if TYPE_CHECKING:
    from moai_llm.config import MoaiConfig
    from moai_llm.inference import load_model, sample_text
    from moai_llm.modeling.model import MoaiForCausalLM, MoaiModel
    from moai_llm.recipe import get_config, get_mamba_config, list_recipes
    from moai_llm.tokenizer import load_tokenizer


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'moai_llm' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


_AUTO = "transformers.models.auto.configuration_auto"


class _WhenAuto:
    """Imports our config as soon as AutoConfig exists; a config, once made, brings its models along.

    To import it from here would be too early: transformers may be half imported at that moment. (wrapt has such hooks,
    but takes most of the time and memory of `import moai_llm`.)
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _AUTO:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_tell(module: Any) -> None:
            execute(module)
            import_module("moai_llm.config")

        spec.loader.exec_module = execute_and_tell  # type: ignore[method-assign]
        return spec


if _AUTO in sys.modules:
    import_module("moai_llm.config")
else:
    sys.meta_path.insert(0, _WhenAuto())
