"""Programming languages by the suffix of their files."""

CODE = {
    ".py": "python", ".pyi": "python", ".js": "javascript", ".jsx": "javascript", ".mjs": "javascript",
    ".ts": "typescript", ".tsx": "typescript", ".java": "java", ".kt": "kotlin", ".scala": "scala", ".c": "c",
    ".h": "c", ".cc": "c++", ".cpp": "c++", ".cxx": "c++", ".hpp": "c++", ".cu": "cuda", ".cuh": "cuda", ".cs": "c#",
    ".go": "go", ".rs": "rust", ".swift": "swift", ".rb": "ruby", ".php": "php", ".pl": "perl", ".lua": "lua",
    ".r": "r", ".jl": "julia", ".hs": "haskell", ".ml": "ocaml", ".ex": "elixir", ".exs": "elixir", ".erl": "erlang",
    ".clj": "clojure", ".dart": "dart", ".zig": "zig", ".sh": "shell", ".sql": "sql", ".proto": "protobuf",
}  # fmt: skip
PROSE = {".txt": "text", ".md": "markdown", ".mdx": "markdown", ".rst": "restructuredtext", ".tex": "latex"}
