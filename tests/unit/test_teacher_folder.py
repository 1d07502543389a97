"""A teacher on disk is recognised, or refused with a sentence; `teacher/` holds what the student side needs of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pipeline.commit import file_sha256
from pipeline.errors import UserError
from pipeline.teacher_folder import TeacherFolder
from teacher_dump.teacher import Teacher, locate, open_teacher, write_teacher_folder
from teacher_dump.token_bytes import token_bytes

V, D = 300, 8
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": V,
    "hidden_size": D,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "rms_norm_eps": 1e-5,
    "eos_token_id": [257, 256],
    "bos_token_id": None,
}


def tokenizer(special: str = "<|endoftext|>") -> Tokenizer:
    made = Tokenizer(
        models.BPE(vocab={c: n for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([special])
    return made


def write_model(folder: Path, tied: bool = True, config: dict[str, Any] | None = None, rows: int = V) -> Path:
    """A model folder of the shape `save_pretrained` writes: two safetensors files, bfloat16."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    embedding = {"model.embed_tokens.weight": torch.randn(rows, D).bfloat16()}
    rest = {"model.norm.weight": torch.randn(D).bfloat16(), "model.layers.0.x": torch.zeros(2)}
    if not tied:
        rest["lm_head.weight"] = torch.randn(rows, D).bfloat16()
    save_file(embedding, str(folder / "model-00001-of-00002.safetensors"))
    save_file(rest, str(folder / "model-00002-of-00002.safetensors"))
    (folder / "config.json").write_text(json.dumps({**CONFIG, "tie_word_embeddings": tied, **(config or {})}))
    tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def opened(folder: Path, separator: str | None = None) -> Teacher:
    return open_teacher(str(folder), Path("data"), separator)


@pytest.mark.parametrize("tied", [True, False])
def test_folder_holds_the_teachers_ends(tied: bool, tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", tied, rows=V + 20)
    teacher = opened(source)
    folder = write_teacher_folder(teacher, tmp_path / "cache", "claim")
    assert folder.facts == teacher.facts == TeacherFolder(tmp_path / "cache" / "teacher").facts
    assert (folder.facts.vocab_size, folder.facts.width, folder.facts.tied) == (V, D, tied)
    assert (folder.facts.dtype, folder.facts.eos_id, folder.facts.separator_id) == ("bfloat16", 257, 256)
    tensors = folder.tensors()
    wanted = {
        **load_file(source / "model-00001-of-00002.safetensors"),
        **load_file(source / "model-00002-of-00002.safetensors"),
    }
    assert torch.equal(tensors["embedding_VD"], wanted["model.embed_tokens.weight"][:V])
    assert torch.equal(tensors["head_VD"], wanted["model.embed_tokens.weight" if tied else "lm_head.weight"][:V])
    assert torch.equal(tensors["norm_D"], wanted["model.norm.weight"])
    assert folder.token_bytes() == token_bytes(tokenizer(), V)
    assert folder.config()["hidden_size"] == D
    for name, entry in folder.files.items():
        path = folder.path / name
        assert (path.stat().st_size, file_sha256(path)) == (entry["bytes"], entry["sha256"])
    stored = {path.name for path in folder.path.iterdir()} - {"teacher.json"}
    assert stored == set(folder.files) == {"config.json", "tokenizer.json", "head.safetensors", "token_bytes.parquet"}


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    folder = write_teacher_folder(opened(write_model(tmp_path / "model")), tmp_path / "cache", "claim")
    assert set(load_file(folder.path / "head.safetensors")) == {"embedding.weight", "norm.weight"}


def test_tied_without_saying_so(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    del config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    assert opened(folder).facts.tied


def test_complete_folder_is_not_written_again(tmp_path: Path) -> None:
    teacher = opened(write_model(tmp_path / "model"))
    folder = write_teacher_folder(teacher, tmp_path / "cache", "claim")
    before = {path: path.stat().st_mtime_ns for path in folder.path.iterdir()}
    write_teacher_folder(teacher, tmp_path / "cache", "claim")
    assert {path: path.stat().st_mtime_ns for path in folder.path.iterdir()} == before


def test_interrupted_folder_is_completed(tmp_path: Path) -> None:
    """teacher.json comes last: without it the other files are written again."""
    teacher = opened(write_model(tmp_path / "model"))
    folder = write_teacher_folder(teacher, tmp_path / "cache", "claim")
    (folder.path / "teacher.json").unlink()
    (folder.path / "head.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match=r"teacher\.json is missing"):
        TeacherFolder(folder.path)
    assert write_teacher_folder(teacher, tmp_path / "cache", "claim").tensors()["head_VD"].shape == (V, D)


@pytest.mark.parametrize("name", ["head.safetensors", "token_bytes.parquet", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("harm", ["flipped", "cut", "gone"])
def test_damaged_file_is_written_again_and_no_other(tmp_path: Path, name: str, harm: str) -> None:
    teacher = opened(write_model(tmp_path / "model"))
    folder = write_teacher_folder(teacher, tmp_path / "cache", "claim").path
    whole = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    data = bytearray(whole[name][0])
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data if harm == "flipped" else data[:9])
    if harm == "gone":
        (folder / name).unlink()
    write_teacher_folder(teacher, tmp_path / "cache", "claim")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {k: v for k, (v, _) in whole.items()}
    assert {path.name for path in folder.iterdir() if path.stat().st_mtime_ns != whole[path.name][1]} == {name}


def test_damaged_record_is_written_again_with_all_it_names(tmp_path: Path) -> None:
    teacher = opened(write_model(tmp_path / "model"))
    folder = write_teacher_folder(teacher, tmp_path / "cache", "claim").path
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "teacher.json").write_bytes(whole["teacher.json"].replace(b"300", b"301"))
    (folder / "head.safetensors").write_bytes(b"half")
    write_teacher_folder(teacher, tmp_path / "cache", "claim")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


def test_file_that_the_teacher_no_longer_has_stays(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model")
    (source / "generation_config.json").write_text("{}")
    folder = write_teacher_folder(opened(source), tmp_path / "cache", "claim").path
    before = (folder / "teacher.json").read_bytes()
    (source / "generation_config.json").unlink()
    write_teacher_folder(opened(source), tmp_path / "cache", "claim")
    assert (folder / "teacher.json").read_bytes() == before


def test_another_teachers_folder_is_refused(tmp_path: Path) -> None:
    write_teacher_folder(opened(write_model(tmp_path / "a")), tmp_path / "cache", "claim")
    other = opened(write_model(tmp_path / "b", config={"rms_norm_eps": 1e-6}))
    with pytest.raises(UserError, match="holds teacher .* this run has .*/b "):
        write_teacher_folder(other, tmp_path / "cache", "claim")


def test_identity_follows_weights_config_and_tokenizer_not_the_place(tmp_path: Path) -> None:
    first = opened(write_model(tmp_path / "a")).facts
    assert replace(opened(write_model(tmp_path / "b")).facts, name=first.name) == first
    seen = {first.teacher_sha256}
    changed = write_model(tmp_path / "c")
    tensors = load_file(changed / "model-00002-of-00002.safetensors")
    tensors["model.layers.0.x"][0] = 1
    save_file(tensors, str(changed / "model-00002-of-00002.safetensors"))
    seen.add(opened(changed).facts.teacher_sha256)
    seen.add(opened(write_model(tmp_path / "d", config={"rms_norm_eps": 1e-6})).facts.teacher_sha256)
    retokenized = write_model(tmp_path / "e")
    tokenizer("<|other|>").save(str(retokenized / "tokenizer.json"))
    facts = opened(retokenized).facts
    assert len({*seen, facts.teacher_sha256}) == 4 and facts.tokenizer_sha256 != first.tokenizer_sha256


def test_separator(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    assert opened(folder, separator="a").facts.separator_id == tokenizer().token_to_id("a")
    with pytest.raises(UserError, match="separator '<nope>': the tokenizer of .* has no such token"):
        opened(folder, separator="<nope>")
    tokenizer("<|other|>").save(str(folder / "tokenizer.json"))
    assert opened(folder).facts.separator_id == 257, "the end-of-sequence token where no known separator is there"


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({}, {"logit_scale": 1.0, "soft_cap": None, "embedding_scale": 1.0, "norm_offset": 0.0}),
        (
            {"model_type": "gemma2", "final_logit_softcapping": 30.0},
            {"soft_cap": 30.0, "embedding_scale": D**0.5, "norm_offset": 1.0},
        ),
        ({"logit_scale": 0.0625}, {"logit_scale": 0.0625}),
        ({"logits_scaling": 8.0, "embedding_multiplier": 12.0}, {"logit_scale": 0.125, "embedding_scale": 12.0}),
        ({"text_config": {"rms_norm_eps": 1e-3}}, {"norm_eps": 1e-3}),
        ({"text_config": None}, {"norm_eps": 1e-5}),
    ],
    ids=str,
)
def test_facts_of_model_families(config: dict[str, Any], wanted: dict[str, Any], tmp_path: Path) -> None:
    facts = opened(write_model(tmp_path / "model", config=config)).facts
    assert {name: getattr(facts, name) for name in wanted} == wanted


def damage_header(folder: Path) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(b"\x00" * 4 + path.read_bytes()[4:])


def cut_weights(folder: Path) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def remove_weights(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.unlink()


def large_id(folder: Path) -> None:
    """A tokenizer of 257 ids beside a model of fewer."""
    (folder / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 250}))


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), r"has no config\.json"),
    "config not json": (lambda d: (d / "config.json").write_text("{"), r"config\.json is not valid JSON"),
    "config of something else": (
        lambda d: (d / "config.json").write_text('{"hidden_size": 8}'),
        r"config\.json lacks vocab_size, num_hidden_layers, num_attention_heads",
    ),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), r"has no tokenizer\.json"),
    "damaged tokenizer": (lambda d: (d / "tokenizer.json").write_text('{"model": 3}'), r"tokenizer\.json is damaged"),
    "tokenizer of another model": (large_id, r"tokenizer\.json has id 256, config\.json says vocab_size 250"),
    "no weights": (remove_weights, r"has no \.safetensors weights"),
    "damaged weights": (damage_header, r"model-00002-of-00002\.safetensors are damaged"),
    "weights cut short": (cut_weights, r"model-00001-of-00002\.safetensors are damaged"),
    "unknown architecture": (
        lambda d: save_file({"decoder.norm": torch.ones(D)}, str(d / "model-00002-of-00002.safetensors")),
        r"has none of the tensors model\.norm\.weight",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folder_is_one_sentence_that_names_it(name: str, tmp_path: Path) -> None:
    change, said = BAD[name]
    folder = write_model(tmp_path / "model")
    opened(folder)
    change(folder)
    with pytest.raises(UserError, match=said) as raised:
        opened(folder)
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    for name in (str(tmp_path / "nowhere"), "./nowhere", "a/b/c"):
        with pytest.raises(UserError, match="there is no such folder"):
            locate(name, tmp_path)
    with pytest.raises(UserError, match="embedded:nothing is no embedded teacher"):
        locate("embedded:nothing", tmp_path)


@pytest.mark.parametrize("name", ["head.safetensors", "token_bytes.parquet", "config.json"])
@pytest.mark.parametrize("how", ["missing", "cut"])
def test_incomplete_teacher_folder_of_a_cache_is_a_user_error(name: str, how: str, tmp_path: Path) -> None:
    folder = write_teacher_folder(opened(write_model(tmp_path / "model")), tmp_path / "cache", "claim")
    path = folder.path / name
    data = path.read_bytes()
    path.unlink()
    if how == "cut":
        path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=name):
        found = TeacherFolder(folder.path)
        found.tensors(), found.token_bytes(), found.config()


def test_a_licence_goes_along_and_is_no_part_of_the_identity(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model")
    before = opened(source).facts
    write_teacher_folder(opened(source), tmp_path / "cache", "claim")
    (source / "LICENSE").write_text("MIT License")
    folder = write_teacher_folder(opened(source), tmp_path / "cache", "claim")
    assert folder.file("LICENSE").read_text() == "MIT License" and folder.facts == before


def test_a_gpt2_is_read_under_its_own_names(tmp_path: Path) -> None:
    """n_embd, n_layer and n_head; tensors as the hub's GPT-2 calls them, without `transformer.`."""
    folder = tmp_path / "gpt2"
    folder.mkdir()
    config = {"model_type": "gpt2", "vocab_size": V, "n_embd": D, "n_layer": 3, "n_head": 2, "layer_norm_epsilon": 1e-4}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"wte.weight": torch.randn(V, D), "ln_f.weight": torch.randn(D)}, str(folder / "model.safetensors"))
    tokenizer().save(str(folder / "tokenizer.json"))
    facts = write_teacher_folder(opened(folder), tmp_path / "cache", "claim").facts
    assert (facts.width, facts.layers, facts.heads, facts.norm_eps, facts.tied) == (D, 3, 2, 1e-4, True)
