"""How fast stage one is, as a share of vLLM's bare prefill in the same run.

    python -m benchmarks.dump_throughput --shapes qwen2.5-1.5b llama-3.1-8b
    python -m benchmarks.dump_throughput --model path/to/config.json

Cases: `bare` (vLLM prefill, one token sampled), `flat` (vLLM's prompt_logprobs with flat_logprobs), `topk` (ours:
top-k, lse, tails, target logit, to pinned memory), `all` (and attention maps), `hidden` (and hidden states),
`committed` (a dump of text to committed shards with the signals of `all`). A shape runs with random weights;
`committed` writes such a teacher as a folder first, with the embedded teacher's tokenizer. Rows replace those of the
same shape and case in RESULTS/dump_throughput.json, all of which are shown; shares are always of the `bare` of the
same run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.measured import RESULTS, Row, device_name, merged_with, read_rows, table, write_results
from benchmarks.processes import in_own_process, spare_processes
from benchmarks.throughput_case import TAUS, Case

CASES = ("bare", "flat", "topk", "all", "hidden", "committed")
KEPT = ("memory_gb", "tokens", "bytes_per_token", "cores", "file_system")
COLUMNS = ("shape", "case", "tokens_per_s", "share", "memory_gb", "tokens", "bytes_per_token")
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-1.5b": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960,
        "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936,
        "max_position_embeddings": 32768, "tie_word_embeddings": True, "rope_theta": 1000000.0,
    },
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 128256, "max_position_embeddings": 32768, "tie_word_embeddings": False, "rope_theta": 500000.0,
    },
}  # fmt: skip
"""Of the published models' config.json, what decides speed."""
_COMMON = {"torch_dtype": "bfloat16", "rms_norm_eps": 1e-6, "hidden_act": "silu", "eos_token_id": 0, "pad_token_id": 0}


def shape_folder(config: dict[str, Any], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**_COMMON, **config}))
    return folder


def random_teacher(folder: Path, tokenizer: Path) -> None:
    """Give a folder with a config.json random weights, and a tokenizer whose ids its vocabulary holds."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)


def measure(case: Case) -> dict[str, Any]:
    """Run one case in a process of its own.

    Raises:
        RuntimeError: it failed; the text ends with what it said.
    """
    return in_own_process("benchmarks.throughput_case", asdict(case))


def measure_shape(name: str, folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All cases of one shape; a failed one is reported and left out."""
    rows: list[dict[str, Any]] = []
    bare = 0.0
    for kind in arguments.cases:
        tokens = {"flat": arguments.tokens // 4, "committed": arguments.committed_tokens}.get(kind, arguments.tokens)
        profile = str(Path(arguments.profile) / f"{name}-{kind}.txt") if arguments.profile else ""
        case = Case(
            kind, str(folder), tokens, arguments.length, rows_per_step=arguments.rows_per_step,
            dummy=not (folder / "model.safetensors").exists(), text=arguments.text, profile=profile,
        )  # fmt: skip
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
            try:
                if kind == "committed":
                    teacher = folder
                    if case.dummy:
                        teacher = Path(shutil.copytree(folder, Path(scratch) / "teacher"))
                        random_teacher(teacher, Path(arguments.tokenizer))
                    case = Case(**{**asdict(case), "model": str(teacher), "cache": f"{scratch}/cache"})
                found = measure(case)
            except (RuntimeError, OSError) as error:
                print(error, file=sys.stderr, flush=True)
                continue
        bare = found["tokens_per_s"] if kind == "bare" else bare
        row = {"shape": name, "case": kind, "tokens_per_s": found["tokens_per_s"]}
        row["share"] = found["tokens_per_s"] / bare if bare else None
        rows.append({**row, **{key: found[key] for key in KEPT if key in found}})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def save(arguments: argparse.Namespace, rows: list[Row]) -> Path:
    """After each shape, so that a time limit costs only the one at hand."""
    device = device_name()
    kept = merged_with(arguments.name, rows, ("shape", "case"), device=device, folder=arguments.results)
    settings: dict[str, Any] = {
        "length": arguments.length,
        "k": 64,
        "taus": TAUS,
        "block": 64,
        "groups": 6,
        "window": 64,
    }
    settings["enforce_eager"] = True  # every case, bare prefill too: vLLM without compilation and CUDA graphs
    return write_results(arguments.name, kept, device=device, folder=arguments.results, settings=settings)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=[], choices=[*SHAPES, []], help="published shapes to measure")
    parser.add_argument("--model", nargs="*", default=[], help="config.json files or model folders to measure")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
    parser.add_argument("--tokens", type=int, default=2_097_152, help="tokens of a case; flat takes a quarter")
    parser.add_argument("--committed_tokens", type=int, default=20_971_520, help="tokens of the case committed")
    parser.add_argument("--length", type=int, default=2048, help="T")
    parser.add_argument("--rows_per_step", type=int, default=0, help="0: what a dump takes")
    parser.add_argument("--text", default="data/enwik8.jsonl.zst", help="corpus of the case committed")
    parser.add_argument("--tokenizer", default="data/smollm2-135m", help="folder with the tokenizer of that case")
    parser.add_argument("--scratch", help="folder on the disk that shards are written to")
    parser.add_argument("--profile", default="", help="folder for tables: kernels by time, of committed the host's")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--name", default="dump_throughput", help="of the JSON")
    arguments = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as shapes, spare_processes():
        folders = {name: shape_folder(SHAPES[name], Path(shapes) / name) for name in arguments.shapes}
        for path in map(Path, arguments.model):
            name = path.parent.name if path.is_file() else path.name
            folders[name] = shape_folder(json.loads(path.read_text()), Path(shapes) / name) if path.is_file() else path
        for name, folder in folders.items():
            rows += measure_shape(name, folder, arguments)
            path = save(arguments, rows)
    if not rows:
        return 1
    print(table(read_rows(path), COLUMNS))
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
