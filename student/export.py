"""`python -m student.export`: a trained student as a Hugging Face folder that needs neither this project nor `xlstm`.

    python -m student.export --run runs/demo --out exports/demo

Writes into the folder, config.json last:

    *_distil_xlstm.py        configuration, blocks, model: the files of `student/exporting/huggingface`, as they are
    model.safetensors        trained parameters, the teacher's embedding, its head unless tied
    tokenizer.json, ...      the teacher's tokenizer
    generation_config.json   the ids that end a text
    README.md, LICENSE       the model card with the run's evaluation; the code's licence (and LICENSE.teacher)
    config.json              makes the folder one that transformers loads

Before anything is written, the exported model's logits are compared with the student's.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from pipeline.commit import commit_bytes, commit_file, fsync_folder
from pipeline.config import parse_into
from pipeline.errors import UserError, one_line, run_command
from pipeline.licences import LICENCE_FILES
from pipeline.teacher_folder import MOST_CONFIG_BYTES, TeacherFolder
from student.runs.checkpoint import RunRecord, load_student

CODE = (
    "configuration_distil_xlstm.py",
    "blocks_distil_xlstm.py",
    "transformer_blocks_distil_xlstm.py",
    "modeling_distil_xlstm.py",
)
HERE = Path(__file__).parent / "exporting" / "huggingface"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
AUTO_MAP = {
    "AutoConfig": "configuration_distil_xlstm.DistilXLSTMConfig",
    "AutoModel": "modeling_distil_xlstm.DistilXLSTMModel",
    "AutoModelForCausalLM": "modeling_distil_xlstm.DistilXLSTMForCausalLM",
}
OWN = {*CODE, *TOKENIZER, "model.safetensors", "generation_config.json", "README.md", "LICENSE", "LICENSE.teacher"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ExportOptions:
    """Write a trained student as a Hugging Face folder."""

    run: Path
    """Run folder of the student."""
    out: Path
    """Folder to write; a new one, or that of an earlier export."""
    checkpoint: str = "last"
    """last, best, or the path of a checkpoint."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the stored weights; float32 gives the student's own logits, bfloat16 takes half the space."""
    cache: str | None = None
    """Cache the student learnt from, which says what the corpus is; null: those that the run names, if here"""
    teacher_licence: str | None = None
    """The teacher's licence as Hugging Face cards name it (apache-2.0); null: what its folder or name says."""
    corpus_licence: str | None = None
    """The corpus's licence; null: what its name says."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: where.
        parameters: of the model, tied ones once.
        bytes: of model.safetensors.
        deviation: of its logits from the student's, as a share of the largest: at the worst position of made-up ids.
        typical_deviation: the same at the median one.
    """

    folder: Path
    parameters: int
    bytes: int
    deviation: float
    typical_deviation: float


def export(options: ExportOptions) -> Exported:
    """Write the folder.

    Raises:
        UserError: no such run or checkpoint, one that does not fit, a folder that holds something else, transformers
            missing, or a cache of another teacher.
    """
    try:
        from student.exporting import weights
        from student.exporting.model_card import CardSource, model_card
    except ImportError as error:
        raise UserError(f"export needs the package transformers ({one_line(error)}): install it") from None
    out, dtype = options.out, DTYPES[options.dtype]
    check_target(out)
    RunRecord.read(options.run)
    source = CardSource(options.run, options.checkpoint, options.cache, options.teacher_licence, options.corpus_licence)
    student, teacher = load_student(options.run, options.checkpoint)
    student.float()
    config = weights.exported_config(student)
    tensors = weights.exported_tensors(student, dtype)
    model = weights.exported_model(config, tensors)
    deviations_BT = weights.deviations(student, model)
    deviation, typical = float(deviations_BT.max()), float(deviations_BT.median())
    if dtype == torch.float32 and not weights.is_rounding(student, deviation):
        raise UserError(
            f"{options.run}: the exported model's logits differ from the student's by {deviation:.1e} of the largest: "
            "its weights are not finite, or this is a fault of the export; nothing was written"
        )
    config.architectures, config.auto_map, config.dtype = ["DistilXLSTMForCausalLM"], AUTO_MAP, options.dtype
    files = {name: (HERE / name).read_bytes() for name in CODE}  # first: they tell the folder from others
    files |= tokenizer_files(teacher)
    files["generation_config.json"] = _json(
        {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    )
    files["LICENSE"] = own_licence().encode()
    for name in LICENCE_FILES:
        if name in teacher.files:
            files["LICENSE.teacher"] = teacher.file(name).read_bytes()
            break
    parameters = sum(tensor.numel() for tensor in tensors.values())
    trained = student.trainable_parameters()
    card = source.facts(teacher, config, options.dtype, trained, parameters, student.unfrozen)
    files["README.md"] = model_card(card).encode()

    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").unlink(missing_ok=True)
    for name in OWN - files.keys():
        (out / name).unlink(missing_ok=True)
    fsync_folder(out)
    for name, content in files.items():
        commit_bytes(out / name, content)
    written = commit_file(out / "model.safetensors", lambda path: write_weights(path, tensors))
    commit_bytes(out / "config.json", config.to_json_string().encode())
    return Exported(out, parameters, written.bytes, deviation, typical)


def write_weights(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A safetensors file that others may read, which the library's own mode does not let them."""
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)


def check_target(out: Path) -> None:
    """Raise `UserError` unless the folder is new, empty, or that of an earlier export."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: name a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / CODE[0]).is_file():
        raise UserError(f"--out {out} holds other files, and no earlier export: name a new folder")


def tokenizer_files(teacher: TeacherFolder) -> dict[str, bytes]:
    """The tokenizer's files, their names -> content.

    tokenizer_config.json names the class that does what tokenizer.json says, as the teacher's dump did, and no
    stranger's code; and what batches need here: padding on the left, and no token types.

    Raises:
        UserError: a file is missing or damaged.
    """
    files = {name: teacher.file(name).read_bytes() for name in TOKENIZER if name in teacher.files}
    if "tokenizer.json" not in files:
        raise UserError(f"{teacher.path}/teacher.json does not name tokenizer.json: restore the run's teacher folder")
    name = "tokenizer_config.json"
    settings = teacher.json(name, MOST_CONFIG_BYTES) if name in files else {}
    settings.pop("auto_map", None)
    settings |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    facts = teacher.facts
    if settings.get("pad_token") is None:  # batches need one; the mask says where it is padding
        settings["pad_token"] = settings.get("eos_token") or _token(files["tokenizer.json"], facts.separator_id)
    files[name] = _json(settings)
    return files


def _token(tokenizer: bytes, index: int) -> str | None:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(tokenizer.decode()).id_to_token(index)


def own_licence() -> str:
    """The text of this project's licence."""
    beside = Path(__file__).parents[1] / "LICENSE"
    if beside.is_file():
        return beside.read_text(encoding="utf-8")
    text = metadata.distribution("distil-xlstm").read_text("licenses/LICENSE")
    if text is None:
        raise UserError("this project's LICENSE is missing: install it again")
    return text


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    options = parse_into(
        ExportOptions,
        prog="python -m student.export",
        description="Write a trained student as a Hugging Face folder that needs neither this project nor xlstm.",
        file_option="--config",
        arguments=arguments,
    )
    done = export(options)
    print(
        f"{done.folder}: {done.parameters:,} parameters as {options.dtype}, {done.bytes / 1e6:,.1f} MB; on made-up ids "
        f"logits differ from the student's by {done.typical_deviation:.1e} of the largest at the median position, by "
        f"{done.deviation:.1e} at the worst"
    )
    print(f'load it: AutoModelForCausalLM.from_pretrained("{done.folder}", trust_remote_code=True)')
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
