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

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
from safetensors import safe_open

from pipeline.commit import file_sha256, read_json
from pipeline.errors import UserError

if TYPE_CHECKING:  # inspection and verification start fast without torch
    from torch import Tensor


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
        self.path = Path(path)
        if not (self.path / "teacher.json").is_file():
            raise UserError(f"{self.path}/teacher.json is missing: this is no cache, or its dump never started")
        record: dict[str, Any] = read_json(self.path / "teacher.json")
        known = {f.name for f in fields(TeacherFacts)}
        self.facts = TeacherFacts(**{k: v for k, v in record["facts"].items() if k in known})
        self.files: dict[str, dict[str, Any]] = record["files"]

    def _whole(self, name: str) -> Path:
        """The path of a file that `teacher.json` lists, once its size and sha256 have been looked at."""
        path, wanted = self.path / name, self.files[name]
        size = path.stat().st_size if path.is_file() else None
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

    def tensors(self) -> dict[str, Tensor]:
        """`embedding_VD`, `head_VD` (the same tensor where tied), `norm_D`, trimmed to V rows, in the stored dtype."""
        vocab = self.facts.vocab_size
        with safe_open(str(self._whole("head.safetensors")), framework="pt") as file:
            embedding_VD = file.get_tensor("embedding.weight")[:vocab]
            head_VD = embedding_VD if self.facts.tied else file.get_tensor("lm_head.weight")[:vocab]
            return {"embedding_VD": embedding_VD, "head_VD": head_VD, "norm_D": file.get_tensor("norm.weight")}

    def token_bytes(self) -> list[bytes]:
        """The bytes of token ids 0..V-1, in order; special tokens stand for no text and have b""."""
        table = pq.read_table(self._whole("token_bytes.parquet"), page_checksum_verification=True)
        return [value if value is not None else b"" for value in table.column("bytes").to_pylist()]

    def config(self) -> dict[str, Any]:
        """The teacher's Hugging Face configuration as a dictionary."""
        import json

        return json.loads(self._whole("config.json").read_text(encoding="utf-8"))


def facts_record(facts: TeacherFacts, files: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The content of `teacher.json`."""
    return {"facts": asdict(facts), "files": files}
