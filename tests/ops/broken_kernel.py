"""A kernel whose import says that it cannot run here."""

from moai_llm.ops.dispatch import Unavailable

raise Unavailable("needs hardware that is not here")
