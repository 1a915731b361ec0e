"""docs/migration.md tells the truth: every command parses, every key loads, every name imports, nothing is left out.

What the older documents name is checked in below. Where the documents themselves lie beside the repository, they are
read too, so that the list cannot fall behind them.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest
from transformers.activations import ACT2FN

from moai_llm import recipe as recipes
from moai_llm.architecture import Architecture
from moai_llm.cli import COMMANDS
from moai_llm.config import MoaiConfig
from moai_llm.losses import create_loss_function
from moai_llm.modeling.rope import RotaryEmbedding
from moai_llm.recipe import Recipe
from tests.command_lines import check, moai_commands
from tests.conftest import ROOT

PAGE = ROOT / "docs" / "migration.md"
DOCUMENTS = ROOT.parent / "shared" / "documents"
AREAS = {
    "GPU kernels", "batch generation", "code models",
    "expert tools", "long context", "memory", "multi-GPU",
    "planner", "quantization", "serving",
}  # fmt: skip

# document -> every flag, script, configuration key and imported name in it
WRITTEN = {
    "000": """
        --base_tokenizer | --bf16 | --compare | --dataset | --dataset_config | --fast | --gradient_checkpointing |
        --max_samples_per_lang | --max_steps | --mode | --model_path | --model_prefix | --multilingual |
        --no-build-isolation | --output_dir | --pretrained_model | --tokenizer_path | --turbo | --ultrafast |
        --vocab_size | BATCH_SIZE | HierarchicalBalancePacker | MoaiConfig | activations.py | alpha | attention.py |
        beta | ce_weight | chat.py | check_dataset.py | config.py | create_loss_function | factor | focal_gamma |
        focal_weight | gamma | hidden_size | loss | losses.py | max_position_embeddings | model.py | normalization.py
        | num_attention_heads | num_hidden_layers | num_key_value_heads | original_max_position_embeddings | params |
        rope.py | rope_theta | smooth_weight | smoothing | test_inference.py | test_tokenizer.py | train.py |
        train_tokenizer.py | transformer.py | type | use_qk_norm | vocab_size
    """,
    "001": """
        --base_tokenizer | --bf16 | --compare | --dataset | --dataset_config | --fast | --gradient_checkpointing |
        --max_samples_per_lang | --max_steps | --mode | --model_path | --model_prefix | --multilingual |
        --no-build-isolation | --num_proc | --output_dir | --pretrained_model | --tokenizer_path | --turbo |
        --ultrafast | --vocab_size | ./pretrain.sh | BATCH_SIZE | GPU_MEMORY | GRADIENT_ACCUMULATION_STEPS |
        HierarchicalBalancePacker | IN_MEMORY_MAX_SIZE | MoaiConfig | MoaiRMSNorm | NCCL_TIMEOUT | NUM_GPUS |
        TOKENIZERS_PARALLELISM | TORCH_DISTRIBUTED_DEBUG | TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC | activations.py | alpha |
        attention.py | beta | ce_weight | chat.py | check_dataset.py | chunked_cross_entropy_loss | config.py |
        create_loss_function | factor | focal_gamma | focal_weight | gamma | hidden_size | loss | losses.py |
        max_position_embeddings | model.py | normalization.py | num_attention_heads | num_hidden_layers |
        num_key_value_heads | original_max_position_embeddings | params | rope.py | rope_theta | smooth_weight |
        smoothing | test_inference.py | test_tokenizer.py | train.py | train_tokenizer.py | transformer.py | type |
        use_qk_norm | vocab_size
    """,
    "002": """
        --all-sizes | --batch_size | --bits | --chat | --config | --data_path | --gradient_accumulation_steps |
        --gradient_checkpointing | --input_file | --learning_rate | --max_length | --max_new_tokens | --model_path |
        --no-build-isolation | --num_epochs | --output_dir | --output_file | --prompt | --quantize | --test |
        --tokenizer_path | --valid_data_path | --verbose | --version | ./pretrain.sh | MoaiForCausalLM |
        MoaiMambaConfig | MoaiMambaForCausalLM | QUANT_BITS | USE_QUANTIZATION | activations.py |
        advanced_quantization.py | attention.py | conv_kernel_size | decoder.py | expand_factor | generate_mamba.py |
        get_mamba_config | hidden_size | inference.py | intermediate_size | load_mamba_config |
        max_position_embeddings | moai_mamba.py | model.py | model_type | normalization.py | num_hidden_layers |
        quantization.py | quantization_bits | quantize_awq | quantize_fp8 | quantize_gptq | quantize_model |
        rms_norm_eps | rope.py | scripts/generate_mamba.py | scripts/test_mamba.py | scripts/train_mamba.py | ssm.py |
        ssm_config.py | state_size | test_mamba.py | train_mamba.py | use_checkpoint | use_fast_scan |
        use_quantization | vocab_size
    """,
    "003": """
        --bf16 | --cache_dir | --checkpoint | --data_cache_dir | --dataset | --datasets | --deepspeed | --eval_text |
        --fast-mode | --fp16 | --gradient-clipping | --input_dir | --max_length | --memory-profile | --num_gpus |
        --offload-optimizer | --partition-activations | --pipeline-parallel-size | --profile | --prompt |
        --report-interval | --temperature | --tensor-parallel-size | --top_k | --top_p | --trace-export | --verify |
        --weights | --zero-stage | AST-aware tokenization optimization | Adaptive routing strategies | Add expert
        specialization metrics | Add pattern caching mechanisms | Add sophisticated data augmentation | Add sparse
        attention patterns | Advanced KV cache system | Advanced RoPE Enhancements | Attention pattern pruning |
        Automatic precision switching | Basic pairwise contrastive loss | Begin with pairwise contrastive loss |
        Benchmark various RoPE configurations | Cache compression | Code AST Optimization | Code Cache System | Code
        Generation Optimization | Code quality evaluation pipeline | Code structure caching system | Code structure
        prefetching | Code-Specific Performance Enhancements | Code-specific tensor optimizations | Conditional
        computation paths | Context-aware completion cache | Contrastive Learning | Create adaptive context window |
        Custom CUDA kernels | Custom CUDA kernels for AST processing | Data augmentation strategies | Design efficient
        KV cache | Develop adaptive routing mechanisms | Develop local-global attention mixing | Dynamic RoPE |
        Dynamic RoPE scaling | Dynamic cache pruning | Dynamic expert pruning | Efficient code repository streaming |
        Efficient tree operation primitives | Enhanced Mixture of Experts | Expert Pruning | Expert dropout
        implementation | Expert specialization metrics | Extended context support | Flash Attention V2 |
        GPU-accelerated code analysis | Git-aware incremental updates | Gradually add attention sparsity | Gradually
        incorporate multi-positive support | Hard negative mining | Hardware Utilization | Implement compression
        strategies | Implement contrastive learning for embeddings | Implement efficient chunking | Implement position
        caching | Implement precision autotuning | Implement progressive chunking | Implement sliding window attention
        | Implement temperature scaling | Implement utilization monitoring | Integrate Flash Attention V2 | KV Cache |
        Language-specific expert routing | Language-specific metrics tracking | Load balancing optimization | Memory
        access optimization | Memory usage optimization | Memory-mapped support | MemoryManager | Multi-language token
        optimization | Multi-positive example support | NTK-aware scaling | Optimize cache management | Optimize for
        extended sequence lengths | Optimize load balancing algorithms | Optimize memory usage patterns | Optimize
        memory-efficient processing | Parallel code preprocessing pipeline | Parallel syntax parsing | Pattern caching
        | Performance Monitoring | PerformanceTracker | Position aliasing reduction | Position caching | Position
        interpolation | Prefetch optimization | Profile and optimize CUDA kernels | Quantized cache storage |
        Real-time performance profiling | Reduce memory footprint | Reduce position aliasing | Sliding Window | Smart
        code deduplication | Start with basic sliding window | Syntax correctness verification | Syntax tree batching
        | Syntax-Aware Attention | Syntax-aware attention masks | Syntax-guided generation | Temperature-scaled
        InfoNCE loss | Training Data Processing | Tree Operation CUDA | Tree-structured beam search | Type-aware
        sampling | Upgrade to Flash Attention V2 | activation_checkpointing | compile_mode | config.py | cpu_offload |
        cudnn_benchmark | data.py | datasets | dtype_policy | generate.py | gradient_accumulation_steps | load_model |
        max_cached_batches | max_length | merge_data.py | merge_strategy | num_workers | offload_optimizer |
        optimizer_state | param_persistence | paths | persistent_workers | pin_memory | pipeline_parallel | precision
        | prefetch_factor | sample_text | temperature | top_k | top_p | train.py | weights | zero_stage
    """,
    "004": """
        build_tokenizer.py | scripts/build_tokenizer.py | scripts/train.py | train.py
    """,
}
NAMES = {document: " ".join(names.split()).split(" | ") for document, names in WRITTEN.items()}


class Row(NamedTuple):
    there: str
    documents: tuple[str, ...]
    here: str
    note: str
    line: int

    @property
    def names(self) -> set[str]:
        """The older names of this row: the words in backticks, the parts of dotted keys, and plain phrases."""
        words = {word for span in spans(self.there) for word in shlex.split(span.replace("'", ""))}
        parts = {part for word in words for part in re.split(r"[./]", word)}
        parts |= {f"{part}.py" for part in parts}  # a tree of files names modules so, a dotted name without
        phrases = {phrase.strip() for phrase in re.split(r"[;,]", self.there)}
        return words | parts | phrases

    def __str__(self) -> str:
        return f"line {self.line}: {self.here}"


def spans(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def read_rows(markdown: str) -> Iterator[Row]:
    """The rows of every table that begins `| there | here | note |`."""
    inside = False
    for number, line in enumerate(markdown.splitlines(), 1):
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            inside = False
        elif cells[:2] == ["there", "here"]:
            inside = True
        elif inside and not set(cells[0]) <= set("-: "):
            assert len(cells) == 3, f"line {number}: a row has three cells, here are {len(cells)}"
            found = re.fullmatch(r"(.+?)((?: \d{3})+)", cells[0])
            assert found, f"line {number}: the first cell ends with the numbers of its documents"
            yield Row(found[1], tuple(found[2].split()), cells[1], cells[2], number)


TEXT = PAGE.read_text(encoding="utf-8")
PROSE = re.sub(r"```.*?```", "", TEXT, flags=re.S)
ROWS = list(read_rows(TEXT))
LIVE = [row for row in ROWS if not row.here.startswith(("not yet:", "no:"))]


def check_here(here: str) -> None:
    """Raise where a `here` cell of existing things is not true."""
    if re.sub(r"`[^`]+`", "X", here) not in ("X", "X and X"):
        raise ValueError(f"{here!r} is not one or two names in backticks")
    for span in spans(here):
        if span.startswith("moai "):
            check(span)
            check_length(span)
        elif span.startswith("moai_llm"):
            import_name(span)
        else:
            check_overrides(shlex.split(span))


def check_length(line: str) -> None:
    """A training command says how long to train exactly once, or it is refused when it runs."""
    words = shlex.split(line)
    if words[1] == "train" and words[2] in recipes.list_recipes():
        run = recipes.load(words[2], [word for word in words[3:] if "=" in word]).train
        given = [value for value in (run.steps, run.tokens, run.epochs) if value is not None]
        if len(given) != 1:
            raise ValueError(f"{line}: {len(given)} of train.steps, train.tokens and train.epochs are set")


def check_overrides(overrides: list[str]) -> None:
    """All overrides of a cell together, over a preset whose dictionaries hold what the cell does not say."""
    recipe = recipes.load("moai-3b", overrides)
    create_loss_function({"type": recipe.loss.type, "params": recipe.loss.params})
    assert recipe.model.hidden_act in ACT2FN
    rope = recipe.model.rope_parameters
    if rope is not None:
        known = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings", "beta_slow", "beta_fast"}
        if not set(rope) <= known:
            raise ValueError(f"{overrides}: unknown rope parameters {sorted(set(rope) - known)}")
        RotaryEmbedding(MoaiConfig(**asdict(recipe.model)))


def import_name(name: str) -> object:
    """The module, or the attribute of a module, that a dotted name means."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: object = import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise ImportError(name)


def missing(names: list[str], document: str, rows: list[Row]) -> list[str]:
    """Those names that no row of this document holds."""
    held = {name for row in rows if document in row.documents for name in row.names}
    return [name for name in names if name not in held]


def names_in(document: str) -> list[str]:
    """Flags, scripts, variables, keys of configurations, classes, imported names and open points of a document."""
    found = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", document))
    found |= set(re.findall(r"(?:python|deepspeed)\s+(?:--\S+\s+)*([\w/]+\.py)", document))
    found |= set(re.findall(r"\./\w+\.sh", document)) | set(re.findall(r"\b[a-z]\w*\.py\b", document))
    found |= set(re.findall(r"\b([A-Z]+(?:_[A-Z]+)+)=", document)) | set(re.findall(r"^ *class (\w+)", document, re.M))
    found |= set(re.findall(r"^ *- \[ \] (.+)$", document, re.M))
    found |= set(re.findall(r"^\| ([\w -]+) \| (?:High|Medium|Low) \|", document, re.M))
    notes = re.search(r"^## Implementation Notes\n(.*?)^## ", document, re.M | re.S)
    found |= set(re.findall(r"^- (.+)$", notes[1], re.M)) if notes else set()
    for language, block in re.findall(r"^ *```(\w+)\n(.*?)^ *```", document, re.M | re.S):
        if language in ("json", "python"):
            found |= set(re.findall(r"[\"'](\w+)[\"']\s*:", block))
        if language == "yaml":
            found |= set(re.findall(r"^ *(\w+):", block, re.M))
        for names in re.findall(r"^from (?:moai_llm\S*|generate) import (.+)$", block, re.M):
            found |= {name.strip() for name in names.split(",")}
    return sorted(found)


def test_the_page_has_rows() -> None:
    assert len(ROWS) > 200 and len(LIVE) > 100


def test_the_session_at_the_top() -> None:
    commands = list(moai_commands(TEXT))
    assert [command.words[1] for command in commands] == ["tokenizer", "data", "data", "train", "train", "chat"]
    for command in commands:
        check(command.words)
        check_length(str(command))


@pytest.mark.parametrize("row", LIVE, ids=str)
def test_what_is_here_is_here(row: Row) -> None:
    check_here(row.here)


@pytest.mark.parametrize("row", [row for row in ROWS if row not in LIVE], ids=str)
def test_what_is_not_here_says_why(row: Row) -> None:
    kind, _, rest = row.here.partition(": ")
    if kind == "not yet":
        assert rest in AREAS
    else:
        assert len(rest.split()) > 3 and ". " not in rest and not rest.endswith(".")
        assert all(span.split()[1] in COMMANDS for span in spans(rest) if span.startswith("moai "))


def test_names_outside_the_tables() -> None:
    there = {span for row in ROWS for span in spans(row.there)}
    for span in set(spans(PROSE)) - there:
        if span.startswith("moai_llm") and span != "moai_llm.x.y":
            import_name(span)
        if span.startswith("moai ") and span != "moai ...":
            assert span.split()[1].strip(",") in {*COMMANDS, "--version"}, span
        section, dot, key = span.partition("=")[0].partition(".")
        if dot and section in Recipe.__dataclass_fields__ and not span.endswith((".py", ")")):
            assert key.split(".")[0] in recipes._keys_at([section]), span
    presets = {span for span in spans(PROSE) if re.fullmatch(r"(moai|blues|khanh)-[\w.-]+", span)}
    assert presets and presets <= set(recipes.list_recipes())


def test_the_published_model_files(tmp_path: Path) -> None:
    """What the rows about the JSON files say: one is refused until three keys are added, the other loads as it is."""
    file = tmp_path / "config.json"
    transformer = {
        "vocab_size": 122100, "hidden_size": 3840, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "max_position_embeddings": 32768, "rope_theta": 1000000.0, "use_qk_norm": True,
    }  # fmt: skip
    file.write_text(json.dumps(transformer))
    with pytest.raises(ValueError, match="got 137: set head_dim"):
        recipes.get_config(file)
    file.write_text(
        json.dumps({**transformer, "head_dim": 128, "intermediate_size": 5120, "tie_word_embeddings": True})
    )
    assert recipes.get_config(file).to_dict() == recipes.get_config("moai-3b").to_dict()
    mamba = {
        "model_type": "mamba_moai", "vocab_size": 128000, "hidden_size": 2048, "intermediate_size": 5632,
        "num_hidden_layers": 24, "state_size": 16, "conv_kernel_size": 4, "expand_factor": 2,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-05, "use_fast_scan": True, "use_checkpoint": True,
        "quantization_bits": 4, "use_quantization": False,
    }  # fmt: skip
    file.write_text(json.dumps(mamba))
    assert recipes.get_config(file).to_dict() == recipes.get_mamba_config("2b").to_dict()


def test_counts_in_the_text() -> None:
    """A parameter count that the page prints is a preset's count."""
    counts = {f"{recipes.load(name).model.parameters()['total']:,}" for name in recipes.list_recipes()}
    printed = set(re.findall(r"\d{1,3}(?:,\d{3}){3}", TEXT))
    assert printed and printed <= counts
    assert isinstance(recipes.load("moai-3b").model, Architecture)


@pytest.mark.parametrize("document", sorted(NAMES))
def test_nothing_is_left_out(document: str) -> None:
    assert not missing(NAMES[document], document, ROWS)


@pytest.mark.skipif(not DOCUMENTS.is_dir(), reason="the older documents are not part of the repository")
def test_the_list_is_complete() -> None:
    files = sorted(DOCUMENTS.glob("[0-9]*.txt"))
    assert len(files) == 5
    for file in files:
        number = file.name[:3]
        found = names_in(file.read_text(encoding="utf-8"))
        assert not missing(found, number, ROWS), f"{number}: no row holds these"
        assert set(found) <= set(NAMES[number]), (
            f"{number}: checked in are not {sorted(set(found) - set(NAMES[number]))}"
        )


@pytest.mark.parametrize(
    "here",
    [
        "`moai trian moai-3b`", "`moai train moai-3b --quantize`", "`moai train moai-3b optim.learning_rate=1`",
        "`moai train moai-3b train.epochs=3 train.steps=5`", "`optim.learning_rate=1`", "`loss.params.weight=1`",
        "`model.rope_parameters.alhpa=1`", "`model.rope_parameters.rope_type=yarm`",
        "`moai_llm.modeling.quantization.quantize_model`", "somewhere", "`optim.lr=1` perhaps",
    ],
)  # fmt: skip
def test_controls_a_false_cell_is_seen(here: str) -> None:
    with pytest.raises((ValueError, ImportError, AttributeError)):
        check_here(here)


def test_controls_a_missing_name_is_seen() -> None:
    assert missing(["--made_up", "--vocab_size"], "000", ROWS) == ["--made_up"]
    assert missing(["--vocab_size"], "004", ROWS) == ["--vocab_size"]  # that document does not have it
    assert missing(["--turbo"], "000", [row for row in ROWS if "--turbo" not in row.names]) == ["--turbo"]
    assert "--made_up" in names_in("run `python x.py --made_up`") and "x.py" in names_in("run `python x.py --made_up`")
