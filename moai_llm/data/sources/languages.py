"""Languages by the suffix of their files: those whose syntax is known to us, and others that are only named."""

from moai_llm.tokenizer.syntax import SUFFIXES

CODE = {
    **{suffix: language for language, suffixes in SUFFIXES.items() for suffix in suffixes},
    ".kt": "kotlin", ".scala": "scala", ".cu": "cuda", ".cuh": "cuda", ".cs": "csharp", ".swift": "swift",
    ".rb": "ruby", ".php": "php", ".pl": "perl", ".lua": "lua", ".r": "r", ".jl": "julia", ".hs": "haskell",
    ".ml": "ocaml", ".ex": "elixir", ".exs": "elixir", ".erl": "erlang", ".clj": "clojure", ".dart": "dart",
    ".zig": "zig", ".sh": "shell", ".sql": "sql", ".proto": "protobuf",
}  # fmt: skip
PROSE = {".txt": "text", ".md": "markdown", ".mdx": "markdown", ".rst": "restructuredtext", ".tex": "latex"}
