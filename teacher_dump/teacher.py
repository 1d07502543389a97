"""The teacher: where its weights are, what identifies it, and the `teacher/` folder that the student side reads.

The folder is written before the first shard, so that a cache whose dump was cut short is already usable.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from pipeline.commit import DigestingFile, canonical_json, commit_file, commit_json, file_sha256
from pipeline.errors import UserError, one_line
from pipeline.stop_signals import stops_wait
from pipeline.store import is_file, size_of
from pipeline.teacher_folder import TeacherFacts, TeacherFolder, facts_record
from teacher_dump.embedded import resolve_embedded
from teacher_dump.head_file import write_safetensors
from teacher_dump.model_config import read_config
from teacher_dump.token_bytes import token_bytes

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
CONFIG_FILES = ("config.json", "generation_config.json")
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
LANGUAGE = "model.language_model."
EMBEDDING = ("model.embed_tokens.weight", "transformer.wte.weight", "wte.weight", f"{LANGUAGE}embed_tokens.weight")
FINAL_NORM = ("model.norm.weight", "transformer.ln_f.weight", "ln_f.weight", f"{LANGUAGE}norm.weight")
NORM_EPS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")
HEAD = ("lm_head.weight",)
DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


@dataclass(frozen=True)
class Teacher:
    """A teacher found on disk.

    Attributes:
        name: as the manifest gives it.
        path: Hugging Face folder with config, tokenizer and safetensors weights.
        facts: what the student side needs to know.
    """

    name: str
    path: Path
    facts: TeacherFacts

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.path)


def locate(name: str, data_root: Path) -> Path:
    """Folder of a teacher: `embedded:NAME`, a local folder, or a hub id (downloaded by huggingface_hub).

    Raises:
        UserError: it cannot be found; says what was tried.
    """
    if name.startswith("embedded:"):
        return resolve_embedded(name, data_root)
    if Path(name).is_dir():
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(
            f"teacher {name}: there is no such folder; name a Hugging Face folder, a hub id or embedded:NAME"
        )
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.safetensors", "*.json", "tokenizer*", "*.model", "LICENSE*"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises many kinds
        raise UserError(f"teacher {name}: no such folder, and the hub did not give it ({one_line(error)})") from None


def load_tokenizer(folder: Path) -> Tokenizer:
    """The fast tokenizer of a Hugging Face folder, without truncation or padding; read once while the file stays."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            f"teacher {folder} has no tokenizer.json: put the tokenizer beside the weights (save_pretrained of a fast "
            "tokenizer writes it)"
        )
    found = path.stat()
    return _read_tokenizer(path, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=4)
def _read_tokenizer(path: Path, mtime_ns: int, size: int) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise UserError(f"teacher tokenizer {path} is damaged ({one_line(error)}): fetch the file again") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def open_teacher(name: str, data_root: Path, separator: str | None) -> Teacher:
    """Find a teacher and read its facts; weights are hashed, not loaded.

    Args:
        separator: token that joins documents; None takes the first of `SEPARATORS` that the tokenizer has, else eos.

    Raises:
        UserError: no config, tokenizer or safetensors weights; or the tokenizer has ids the head does not.
    """
    path = locate(name, data_root)
    if not (path / "config.json").is_file():
        raise UserError(f"teacher {path} has no config.json: it is no Hugging Face model folder")
    config = read_config(path / "config.json")
    tokenizer = load_tokenizer(path)
    vocab = int(config["vocab_size"])
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if largest >= vocab:
        raise UserError(
            f"teacher {path}: tokenizer.json has id {largest}, config.json says vocab_size {vocab}: the "
            f"tokenizer belongs "
            "to another model; put the right one there"
        )
    weights = weight_files(path)
    norm_D = find_tensor(weights, FINAL_NORM, path)
    model_type = str(config.get("model_type", ""))
    gemma = model_type.startswith("gemma")
    scaled = float(config.get("logit_scale") or 1.0) / float(config.get("logits_scaling") or 1.0)
    if scaled != 1.0 and config.get("final_logit_softcapping"):
        raise UserError(
            f"teacher {path}: config.json has both a logit scale and a soft cap, whose order differs between "
            f"models: this "
            "architecture is not known here"
        )
    facts = TeacherFacts(
        name=name,
        teacher_sha256=teacher_sha256(path, weights),
        tokenizer_sha256=file_sha256(path / "tokenizer.json"),
        vocab_size=vocab,
        width=int(config["hidden_size"]),
        layers=int(config["num_hidden_layers"]),
        heads=int(config["num_attention_heads"]),
        tied=is_tied(config, weights),
        norm_eps=float(next((config[name] for name in NORM_EPS if name in config), 1e-6)),
        norm_offset=1.0 if gemma and model_type != "gemma3n" else 0.0,
        embedding_scale=float(config["hidden_size"]) ** 0.5
        if gemma
        else float(config.get("embedding_multiplier", 1.0)),
        logit_scale=scaled,
        soft_cap=config.get("final_logit_softcapping"),
        dtype=DTYPES[norm_D.dtype],
        separator_id=separator_id(tokenizer, config, separator, path),
        eos_id=_first(config.get("eos_token_id")),
        bos_id=_first(config.get("bos_token_id")),
        pad_id=_first(config.get("pad_token_id")),
    )
    return Teacher(name, path, facts)


def _first(value: Any) -> int | None:
    return value[0] if isinstance(value, list) else value


def separator_id(tokenizer: Tokenizer, config: dict[str, Any], separator: str | None, path: Path) -> int:
    """Id of the token that joins documents."""
    for token in (separator,) if separator else SEPARATORS:
        found = tokenizer.token_to_id(token)
        if found is not None:
            return int(found)
    eos = _first(config.get("eos_token_id"))
    if separator or eos is None:
        raise UserError(f"separator {separator!r}: the tokenizer of {path} has no such token; name one that it has")
    return int(eos)


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model folder."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise UserError(f"teacher {path} has no .safetensors weights: convert the model with save_pretrained")
    return files


def _names(path: Path) -> set[str]:
    try:
        with safe_open(str(path), framework="pt") as file:
            return set(file.keys())
    except SafetensorError as error:
        raise UserError(f"teacher weights {path} are damaged ({error}): fetch the file again") from None


def find_tensor(files: list[Path], names: tuple[str, ...], path: Path) -> torch.Tensor:
    """The first of `names` that one of `files` holds."""
    for file in files:
        for name in names:
            if name in _names(file):
                with stops_wait(), safe_open(str(file), framework="pt") as tensors:  # torch makes a ValueError of them
                    return tensors.get_tensor(name)
    raise UserError(f"teacher {path} has none of the tensors {', '.join(names)}: its architecture is not known here")


def is_tied(config: dict[str, Any], files: list[Path]) -> bool:
    """Whether the LM head is the embedding."""
    return bool(config.get("tie_word_embeddings", False)) or not any(HEAD[0] in _names(file) for file in files)


def teacher_sha256(path: Path, weights: list[Path]) -> str:
    """Identity of a teacher: weights, config and tokenizer."""
    parts = {p.name: file_sha256(p) for p in [*weights, path / "config.json", path / "tokenizer.json"]}
    return hashlib.sha256(canonical_json(parts)).hexdigest()


def write_teacher_folder(teacher: Teacher, cache: Path, claim: str) -> TeacherFolder:
    """Write of `cache/teacher/` what is missing or damaged; teacher.json comes last and makes it visible.

    Files that match their digest in teacher.json stay as they are. Without a teacher.json that can be trusted nothing
    tells whether they are whole: all are written again.

    Raises:
        UserError: the folder there belongs to another teacher.
    """
    folder = cache / "teacher"
    facts, known = teacher.facts, dict[str, dict[str, Any]]()
    if (found := _found_folder(folder)) is not None:
        if found.facts.teacher_sha256 != teacher.facts.teacher_sha256:
            raise UserError(
                f"{folder} holds teacher {found.facts.name} ({found.facts.teacher_sha256[:12]}), this run has "
                f"{teacher.name} ({teacher.facts.teacher_sha256[:12]}): dump into another folder (CACHE=...)"
            )
        facts, known = found.facts, found.files
    writers: dict[str, Callable[[Path], str]] = {
        name: partial(_copy, teacher.path / name)
        for name in (*CONFIG_FILES, *TOKENIZER_FILES, *LICENCE_FILES)
        if (teacher.path / name).is_file()
    }
    writers |= {
        "head.safetensors": partial(_write_head, teacher),
        "token_bytes.parquet": partial(_write_bytes, teacher),
    }
    files = {name: digest for name, digest in known.items() if _is_whole(folder / name, digest)}
    for name, write in writers.items():
        if name in files:
            continue
        digest = commit_file(folder / name, write, claim=claim)
        files[name] = {"bytes": digest.bytes, "sha256": digest.sha256}
    if found is None or files != known:
        commit_json(folder / "teacher.json", facts_record(facts, files), claim=claim)
    return TeacherFolder(folder)


def _found_folder(folder: Path) -> TeacherFolder | None:
    """The teacher folder that is there; None if its teacher.json is missing or damaged."""
    try:
        return TeacherFolder(folder)
    except UserError:
        return None


def _is_whole(path: Path, digest: dict[str, Any]) -> bool:
    return is_file(path) and size_of(path) == digest["bytes"] and file_sha256(path) == digest["sha256"]


def _copy(source: Path, to: Path) -> str:
    shutil.copyfile(source, to)
    return file_sha256(source)


def _write_head(teacher: Teacher, to: Path) -> str:
    files = weight_files(teacher.path)
    names: dict[str, tuple[str, ...]] = {"embedding.weight": EMBEDDING, "norm.weight": FINAL_NORM}
    if not teacher.facts.tied:
        names["lm_head.weight"] = HEAD
    return write_safetensors(to, {name: find_tensor(files, known, teacher.path) for name, known in names.items()})


def _write_bytes(teacher: Teacher, to: Path) -> str:
    values = token_bytes(teacher.tokenizer(), teacher.facts.vocab_size)
    table = pa.table({"token_id": pa.array(range(len(values)), pa.int32()), "bytes": pa.array(values, pa.binary())})
    with DigestingFile(to) as file:
        pq.write_table(table, file, compression="zstd", write_page_checksum=True)
        return file.sha256()
