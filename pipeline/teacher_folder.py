"""The `teacher/` folder of a cache: what training, evaluation and generation need of the teacher, without the teacher.

Written once by stage one (`teacher_dump/teacher.py`), read by both stages through `TeacherFolder`. Files:

    teacher.json          the facts below and a sha256 of every other file, ends with a digest of itself
    config.json           the teacher's Hugging Face configuration
    tokenizer.json, ...   the tokenizer's files
    head.safetensors      embedding.weight (V', D), lm_head.weight (V', D) unless tied, norm.weight (D,), in the
                          teacher's dtype; V' >= V is the padded row count
    token_bytes.parquet   columns token_id int32, bytes binary: the bytes every token id stands for
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from safetensors import SafetensorError, safe_open

from pipeline.checked_parquet import read_token_bytes
from pipeline.commit import check_depth, commit_bytes, file_sha256, read_json, read_text
from pipeline.errors import UserError, one_line
from pipeline.fields import Fields, check_stays, child
from pipeline.local_copies import default_folder
from pipeline.schema import MOST_VOCABULARY, MOST_WIDTH
from pipeline.store import again, is_file, is_remote, names_in, size_of
from pipeline.thrift import Malformed

if TYPE_CHECKING:  # inspection and verification start fast without torch
    from torch import Tensor


DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""Types of stored weights -> how safetensors names them."""
MOST_HEAD_HEADER = 1 << 16
"""Bytes of the header of `head.safetensors`, which describes three tensors."""
MOST_FILES = 64
MOST_CONFIG_BYTES = 1 << 20
MOST_TOKENIZER_BYTES = 128 << 20
"""Bytes of tokenizer.json; the largest in use have some 33 million."""


@dataclass(frozen=True)
class TeacherFacts:
    """What `teacher.json` says of the teacher.

    Logits are `logit_scale * (h @ head^T)`, or `soft_cap * tanh((h @ head^T) / soft_cap)` where a cap is set; a teacher
    with both is refused, since models differ in their order.
    """

    name: str  # hub id, folder name or "embedded:smollm2-135m"
    teacher_sha256: str  # over weights, config and tokenizer
    tokenizer_sha256: str
    vocab_size: int  # V: ids < V; the head's rows beyond V are padding
    width: int  # D
    layers: int
    heads: int
    tied: bool  # the head is the embedding
    norm_eps: float
    norm_offset: float  # 0 for most; 1 for models that store norm weight minus one (Gemma)
    embedding_scale: float  # 1 for most; sqrt(D) for Gemma
    logit_scale: float
    soft_cap: float | None
    dtype: str  # of the stored weights: "bfloat16", "float32", "float16"
    separator_id: int  # joins documents in the packed stream
    eos_id: int | None
    bos_id: int | None
    pad_id: int | None


class TeacherFolder:
    """Read access to `teacher/`.

    Raises:
        UserError: the folder is missing, incomplete or damaged; names the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path if is_remote(path) else Path(path)
        if not is_file(self.path / "teacher.json"):
            raise UserError(f"{self.path}/teacher.json is missing: this is no cache, or its dump never started")
        # `teacher/` itself may be a link out of a run, put there by its owner; nothing in it may lead further.
        for entry in names_in(self.path):
            check_stays(self.path, self.path / entry)
        where = self.path / "teacher.json"
        record = Fields(read_json(where), where)
        self.facts = read_facts(record.fields("facts"))
        self.files = read_files(record.fields("files"), self.path)

    def file(self, name: str) -> Path:
        """The path of a file that `teacher.json` lists, once its size and sha256 have been looked at."""
        if name not in self.files:
            raise UserError(f"{self.path}/teacher.json does not name {name}, which students need: restore it")
        path, wanted = self.path / name, self.files[name]
        size = size_of(path) if is_file(path) else None
        found = None
        if size is None:
            found = "is missing"
        elif size != wanted["bytes"]:
            found = f"has {size} bytes, teacher.json says {wanted['bytes']}"
        elif file_sha256(path) != wanted["sha256"]:
            found = "does not match its sha256 in teacher.json"
        if found:
            raise UserError(f"{path} {found}: restore it, or remove {self.path} and run the dump again")
        return path

    def check_head(self) -> Path:
        """The path of `head.safetensors`, whose header was looked at: its tensors have the shapes and the type of the
        facts. The library itself sees to it that they lie within the file and do not overlap.

        Raises:
            UserError: they have not, or the file is damaged.
        """
        path = self.file("head.safetensors")
        with open(path, "rb") as raw:
            header = int.from_bytes(raw.read(8), "little")
        if header > MOST_HEAD_HEADER:
            raise UserError(f"{path}: its header claims {header} bytes, three tensors take at most {MOST_HEAD_HEADER}")
        facts = self.facts
        names = ["embedding.weight", *([] if facts.tied else ["lm_head.weight"]), "norm.weight"]
        try:
            with safe_open(str(path), framework="numpy") as file:
                found = {name: (tuple(s.get_shape()), s.get_dtype()) for name in names for s in [file.get_slice(name)]}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read ({one_line(error)}): restore it") from None
        for name, (shape, dtype) in found.items():
            rows = shape[:1] if name != "norm.weight" else (facts.vocab_size,)
            right = shape[-1:] == (facts.width,) and len(shape) == (1 if name == "norm.weight" else 2)
            if not right or rows[0] < facts.vocab_size or dtype not in DTYPES.values():
                wanted = f"a width of {facts.width}, {facts.vocab_size} rows or more"
                raise UserError(f"{path}: {name} has shape {shape} and type {dtype}, teacher.json says {wanted}")
        return path

    def tensors(self) -> dict[str, Tensor]:
        """`embedding_VD`, `head_VD` (the same tensor where tied), `norm_D`, trimmed to V rows, in the stored dtype.

        Raises:
            UserError: see `check_head`.
        """
        vocab = self.facts.vocab_size
        with safe_open(str(self.check_head()), framework="pt") as file:
            embedding_VD = file.get_tensor("embedding.weight")[:vocab]
            head_VD = embedding_VD if self.facts.tied else file.get_tensor("lm_head.weight")[:vocab]
            return {"embedding_VD": embedding_VD, "head_VD": head_VD, "norm_D": file.get_tensor("norm.weight")}

    def token_bytes(self) -> list[bytes]:
        """The bytes of token ids 0..V-1, in order; special tokens stand for no text and have b"".

        Raises:
            UserError: the file is damaged, or not of V ids.
        """
        path = self.file("token_bytes.parquet")
        try:
            return read_token_bytes(path, self.facts.vocab_size)
        except (Malformed, OSError, pa.ArrowException) as error:
            raise UserError(f"{path}: {one_line(error)}: restore it") from None

    def config(self) -> dict[str, Any]:
        """The teacher's Hugging Face configuration as a dictionary.

        Raises:
            UserError: it is damaged.
        """
        return self.json("config.json", MOST_CONFIG_BYTES)

    def json(self, name: str, most: int) -> dict[str, Any]:
        """A JSON object of the folder, of at most `most` bytes.

        Raises:
            UserError: it is missing, larger, or no JSON object.
        """
        path = self.file(name)
        try:
            value = json.loads(read_text(path, most))
            check_depth(value)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not valid JSON ({one_line(error)[:200]}): restore it") from None
        if not isinstance(value, dict):
            raise UserError(f"{path} is no JSON object: restore it")
        return value


def read_facts(record: Fields) -> TeacherFacts:
    """The facts of a `teacher.json`, checked; fields that a newer minor version added are passed over.

    Raises:
        UserError: a field is missing, or has a type or value it cannot have.
    """

    def optional_id(name: str) -> int | None:
        return None if record.absent(name) else record.integer(name, -1, (1 << 31) - 1)

    vocab_size = record.integer("vocab_size", 1, MOST_VOCABULARY)
    return TeacherFacts(
        name=record.text("name"),
        teacher_sha256=record.text("teacher_sha256", 64),
        tokenizer_sha256=record.text("tokenizer_sha256", 64),
        vocab_size=vocab_size,
        width=record.integer("width", 1, MOST_WIDTH),
        layers=record.integer("layers", 1, 1 << 16),
        heads=record.integer("heads", 1, 1 << 16),
        tied=record.flag("tied"),
        norm_eps=record.number("norm_eps", 0, 1),
        norm_offset=record.number("norm_offset", -1e6, 1e6),
        embedding_scale=record.number("embedding_scale", -1e6, 1e6),
        logit_scale=record.number("logit_scale", -1e6, 1e6),
        soft_cap=None if record.absent("soft_cap") else record.number("soft_cap", 1e-6, 1e6),
        dtype=record.choice("dtype", tuple(DTYPES)),
        separator_id=record.integer("separator_id", 0, vocab_size - 1),
        eos_id=optional_id("eos_id"),
        bos_id=optional_id("bos_id"),
        pad_id=optional_id("pad_id"),
    )


def read_files(record: Fields, folder: Path) -> dict[str, dict[str, Any]]:
    """The files a `teacher.json` names, with size and sha256: plain names, so that nothing outside is read.

    Raises:
        UserError: a name or value it cannot have.
    """
    if len(record.record) > MOST_FILES:
        raise UserError(f"{record.where} names {len(record.record)} files, a teacher has at most {MOST_FILES}")
    files = {}
    for name in record.record:
        child(folder, name, record.where)
        entry = record.fields(name)
        files[name] = {"bytes": entry.integer("bytes"), "sha256": entry.sha256("sha256")}
    return files


def facts_record(facts: TeacherFacts, files: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The content of `teacher.json`."""
    return {"facts": asdict(facts), "files": files}


def local_teacher(folder: Path) -> Path:
    """A teacher folder on this machine: the folder itself, or a copy of one on an object store.

    Copies lie in the folder of `pipeline.local_copies`, named after the digest of `teacher.json`, and stay there.
    """
    if not is_remote(folder):
        return folder
    remote = TeacherFolder(folder)
    here = default_folder() / "teachers" / file_sha256(folder / "teacher.json")[:32]
    for name in [*remote.files, "teacher.json"]:  # the last makes it visible
        if not (here / name).is_file():
            commit_bytes(here / name, again((folder / name).read_bytes, folder / name))
    return here
