"""Students that begin with their teacher's weights: what is copied, what is taught, the command and what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers_cache import toy_tokenizer, write_toy_cache
from helpers_prepared import LENGTH, STRIDE, dump_config, write_corpus, write_prepared_cache
from helpers_student import toy_teacher
from helpers_transformer import student_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import student.__main__ as training
from pipeline.commit import read_json
from pipeline.errors import UserError, run_command
from student.evaluate import EvaluateOptions, evaluate
from student.export import ExportOptions, export
from student.from_teacher import FromTeacherOptions, from_teacher, main, read_student
from student.generate import main as generate_main
from student.model import DistilXLSTM, StudentConfig
from student.runs.checkpoint import load_student
from student.transfer.attention_transfer import PARTS, attentions, mixer_parameters, transfer, transfer_losses
from student.transfer.teacher_weights import (
    check_same_function,
    copy_teacher_weights,
    decoder_layers,
    layers_of_blocks,
)

V, D = 61, 64
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "initializer_range": 0.12,
    "rope_theta": 10_000.0,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def teacher_of(kind: str = "llama", **changes: Any) -> PreTrainedModel:
    """A random model whose norms and biases are not what they begin as."""
    torch.manual_seed(3)
    model: PreTrainedModel = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**{**SIZES, **changes})),
    }[kind]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def student_for(model: PreTrainedModel, config: StudentConfig, chosen: list[int]) -> DistilXLSTM:
    """A student with the model's weights."""
    facts, tensors = toy_teacher(V, D, norm_eps=model.config.rms_norm_eps)
    torch.manual_seed(0)
    student = DistilXLSTM(config, facts, tensors, max_length=64)
    copy_teacher_weights(student, decoder_layers(model, "toy"), chosen)
    return student


# What is copied


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "changes", "shape"),
    [
        ("llama", {}, {}),
        ("llama", {"head_dim": 24, "rope_theta": 500.0}, {"head_width": 24, "rope_theta": 500.0}),
        ("qwen2", {}, {"qkv_bias": True}),
    ],
)
def test_softmax_over_a_blocks_q_and_k_is_the_layers_attention(
    kind: str, changes: dict[str, Any], shape: dict[str, Any]
) -> None:
    """Projections, biases, norms, grouped heads and rotary positions are the teacher's; so is the feed-forward."""
    model, chosen = teacher_of(kind, **changes), [0, 1, 3]
    student = student_for(model, student_of(blocks=3, feature_map="none", **shape), chosen)
    layers, ids_BT = decoder_layers(model, "toy"), torch.randint(V, (2, 50))
    with attentions(layers, chosen) as seen:
        model(ids_BT)
    for block, index in zip(student.stack.blocks, chosen, strict=True):
        x_BTD, attention_BTD = seen[index]
        cell, gate_BTE = block.cell_inputs(x_BTD, 0)
        scores = cell.q_BHTd @ cell.k_BHTd.transpose(-1, -2) / math.sqrt(block.head_width)
        future = torch.ones(50, 50, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(future, -torch.inf).softmax(-1) @ cell.v_BHTd
        found_BTD = block.o_proj(mixed.transpose(1, 2).flatten(2) * 2 * torch.sigmoid(gate_BTE))
        torch.testing.assert_close(found_BTD, attention_BTD, rtol=1e-4, atol=1e-5)
        layer = layers[index]
        y_BTD = x_BTD + attention_BTD
        expected_BTD = y_BTD + layer.mlp(layer.post_attention_layernorm(y_BTD))
        torch.testing.assert_close(block.feed_forward(y_BTD), expected_BTD, rtol=1e-4, atol=1e-5)


@given(st.integers(1, 200), st.integers(1, 200))
def test_layers_are_spread_from_the_first_to_the_last(blocks: int, layers: int) -> None:
    if blocks > layers:
        with pytest.raises(UserError, match=f"student.blocks={blocks}, but the teacher has {layers} layers"):
            layers_of_blocks(blocks, layers)
        return
    chosen = layers_of_blocks(blocks, layers)
    assert len(chosen) == blocks and chosen == sorted(set(chosen)) and chosen[0] == 0
    assert chosen[-1] == (layers - 1 if blocks > 1 else 0)
    steps = {b - a for a, b in zip(chosen, chosen[1:], strict=False)}
    assert blocks < 2 or max(steps) - min(steps) <= 1


@pytest.mark.parametrize(
    ("changes", "name", "theirs", "ours"),
    [
        ({"kv_heads": 1}, "self_attn.k_proj.weight", (32, 64), (16, 64)),
        ({"feedforward": 100}, "mlp.gate_proj.weight", (96, 64), (100, 64)),
        ({"head_width": 8}, "self_attn.q_proj.weight", (64, 64), (32, 64)),
        ({"qkv_bias": True}, "self_attn.q_proj.bias", None, (64,)),
    ],
)
def test_both_shapes_are_named_where_they_differ(changes: dict[str, Any], name: str, theirs: Any, ours: Any) -> None:
    with pytest.raises(UserError) as raised:
        student_for(teacher_of(), student_of(blocks=1, **changes), [0])
    told = str(raised.value)
    assert f"layer 0 of the teacher has {name} of shape {theirs}, the student's wants {ours}" in told
    assert "config.json" in told


def test_a_bias_that_the_student_has_no_place_for_is_named() -> None:
    with pytest.raises(UserError, match=r"self_attn\.q_proj\.bias of shape \(64,\), the student's wants None"):
        student_for(teacher_of("qwen2"), student_of(blocks=1), [0])
    with pytest.raises(UserError, match=r"self_attn\.o_proj\.bias"):
        student_for(teacher_of(attention_bias=True), student_of(blocks=1, qkv_bias=True), [0])


def test_teachers_of_another_make_are_refused() -> None:
    for model, told in (
        (
            GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9)),
            "GPT2LMHeadModel has no model.layers",
        ),
        (Qwen3ForCausalLM(Qwen3Config(**SIZES)), r"self_attn\.k_norm, which a block has no place for"),
    ):
        with pytest.raises(UserError, match=told):
            decoder_layers(model, "toy")
    gemma = GemmaForCausalLM(GemmaConfig(**SIZES, head_dim=16))
    decoder_layers(gemma, "toy")
    with pytest.raises(UserError, match="--teacher toy: its layers have the activation gelu"):
        check_same_function(gemma.config, 10_000.0, "toy")
    with pytest.raises(UserError, match=r"residuals times 0\.5"):
        check_same_function(GraniteConfig(**SIZES, residual_multiplier=0.5), 10_000.0, "toy")


def test_positions_must_be_the_teachers_or_none() -> None:
    config = LlamaConfig(**SIZES)
    assert check_same_function(config, 10_000.0, "toy") is None
    with pytest.raises(UserError, match="rope_theta is 500, the teacher toy has 10000"):
        check_same_function(config, 500.0, "toy")
    assert "no rotary positions" in (check_same_function(config, 0.0, "toy") or "")
    config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
    assert "rope_type linear" in (check_same_function(config, 10_000.0, "toy") or "")


# What is taught


@pytest.mark.parametrize("feature_map", ["softmax", "none"])
def test_transfer_lowers_every_error_and_moves_only_mixers(feature_map: str) -> None:
    model, chosen = teacher_of(), [0, 3]
    student = student_for(model, student_of(feature_map=feature_map), chosen)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    teachers = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers, errors = decoder_layers(model, "toy"), []

    def batches() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        while True:
            yield torch.randint(V, (4, 32), generator=generator)

    transfer(student, model.model, layers, chosen, batches(), 200, 3e-3, lambda step, e: errors.append((step, e)))
    assert [step for step, _ in errors] == list(range(1, 201)) and not student.training
    first, last = (torch.stack([e for _, e in part]).mean(0) for part in (errors[:10], errors[-10:]))
    assert (last < 0.8 * first).all() and not model.model.layers[0]._forward_pre_hooks
    moved = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.split(".")[3] for name in moved} <= set(PARTS) and {name.split(".")[2] for name in moved} == {"0", "1"}
    # All of it moves but what no loss depends on: one bias for all input gates of a row that is divided by its sum.
    trained = {id(p) for p in mixer_parameters(student)}
    still = {name for name, p in student.named_parameters() if id(p) in trained and name not in moved}
    assert all(name.endswith("igate.bias") for name in still)
    assert all(torch.equal(tensor, teachers[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_the_error_is_relative_to_the_attention_itself() -> None:
    model = teacher_of()
    student = student_for(model, student_of(blocks=1), [0])
    block, x_BTD = student.stack.blocks[0], torch.randn(2, 9, D)
    mixed_BTD = block.mix(x_BTD) - x_BTD
    assert float(transfer_losses(block, x_BTD, mixed_BTD)) < 1e-10
    assert float(transfer_losses(block, x_BTD, 2 * mixed_BTD)) == pytest.approx(0.25, rel=1e-4)
    block.o_proj.weight.zero_()
    assert float(transfer_losses(block, x_BTD, mixed_BTD)) == pytest.approx(1)


# The command


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama, a cache whose manifest names it, and a file with the student's shape."""
    folder = tmp_path_factory.mktemp("teacher")
    teacher_of().save_pretrained(folder / "model")
    toy_tokenizer(V).save(str(folder / "model" / "tokenizer.json"))
    write_corpus(folder / "corpus.jsonl", 8 * STRIDE)
    write_prepared_cache(dump_config(folder, shards=4))
    transformer = {"feedforward": 96, "kv_heads": 2, "rope_theta": 10_000.0}
    shape = {"blocks": 3, "heads": 4, "final_norm": "teacher", "transformer": transformer}
    (folder / "student.yaml").write_text(yaml.safe_dump({"model": {"student": shape, "loss": {"beta": 0.0}}}))
    return folder


@pytest.fixture(scope="module")
def start(made: Path) -> Path:
    arguments = ["--align_tokens", str(20 * 4 * LENGTH), "--batch_rows", "4", "--device", "cpu"]
    assert main([*given_options(made, made / "start"), *arguments, "--align_lr", "0.003"]) == 0
    return made / "start"


def given_options(made: Path, run: Path) -> list[str]:
    return ["--run", str(run), "--cache", str(made / "cache"), "--student", str(made / "student.yaml")]


def test_the_run_holds_the_taught_student(made: Path, start: Path) -> None:
    record = read_json(start / "from_teacher.json")
    assert record["layers"] == [0, 2, 3] and record["align_tokens"] == 20 * 4 * LENGTH and "note" not in record
    assert len(record["error_first"]) == len(record["error_last"]) == 3
    assert all(b < a for a, b in zip(record["error_first"], record["error_last"], strict=True))
    student, teacher = load_student(start)
    model = LlamaForCausalLM.from_pretrained(made / "model")
    for block, layer in zip(student.stack.blocks, record["layers"], strict=True):
        of = model.model.layers[layer]
        assert torch.equal(block.down_proj.weight, of.mlp.down_proj.weight)
        assert torch.equal(block.mixer_norm.weight, of.input_layernorm.weight)
        assert not torch.equal(block.q_proj.weight, of.self_attn.q_proj.weight)
    torch.testing.assert_close(student.final_norm.weight, model.model.norm.weight)
    torch.testing.assert_close(student.embedding_VD, model.model.embed_tokens.weight)
    assert read_student(made / "student.yaml") == student.config and teacher.facts.width == D


def test_a_start_is_evaluated_exported_and_continued_as_any_run_is(made: Path, start: Path) -> None:
    figures = evaluate(EvaluateOptions(str(start), str(made / "cache"), maps=1))
    assert figures["targets"] > 0 and math.isfinite(figures["student_cross_entropy"])
    assert (start / "evaluation.json").is_file()
    folder = export(ExportOptions(start, made / "exported")).folder
    card = (folder / "README.md").read_text()
    assert "teacher's layers 0, 2, 3" in card and f"{figures['student_perplexity']:,.4f}" in card
    assert generate_main(["--run", str(start), "--prompt", "the", "--max_new_tokens", "3", "--device", "cpu"]) is None


def train(made: Path, run: Path, *more: str) -> int:
    words = ["--config", str(made / "student.yaml"), "--cache", str(made / "cache"), "--run", str(run)]
    return training.main([*words, "--data.batch_rows=4", "--trainer.accelerator=cpu", "--trainer.max_steps=3", *more])


def test_runs_go_on_from_it_and_keep_saying_so(made: Path, start: Path, tmp_path: Path) -> None:
    assert train(made, tmp_path / "a", f"--init_from={start}", "--model.optimizer.lr=1e-9") == 0
    begun, _ = load_student(start)
    trained, _ = load_student(tmp_path / "a")
    for name, tensor in begun.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], tensor, rtol=0, atol=1e-7, msg=name)
    assert math.isfinite(evaluate(EvaluateOptions(str(tmp_path / "a"), str(made / "cache")))["student_cross_entropy"])
    assert train(made, tmp_path / "b", f"--init_from={tmp_path / 'a' / 'checkpoints' / 'last.ckpt'}") == 0
    origin = read_json(start / "from_teacher.json")
    assert read_json(tmp_path / "a" / "from_teacher.json") == read_json(tmp_path / "b" / "from_teacher.json") == origin
    assert train(made, tmp_path / "c") == 0
    assert not (tmp_path / "c" / "from_teacher.json").exists()


def test_a_start_itself_is_no_training_to_go_on_with(made: Path, start: Path) -> None:
    with pytest.raises(UserError, match="holds a student and no settings of a training: .* --init_from"):
        train(made, start)
    with pytest.raises(UserError, match="transformer is "):
        train(made, made / "other", f"--init_from={start}", "--model.student.transformer.feedforward=95")


def test_without_transfer_the_weights_are_the_teachers(made: Path, tmp_path: Path) -> None:
    options = FromTeacherOptions(
        str(tmp_path / "run"), str(made / "cache"), str(made / "student.yaml"), align_tokens=0, batch_rows=4
    )
    record = from_teacher(options)
    assert record["align_tokens"] == 0 and "error_last" not in record
    student, _ = load_student(tmp_path / "run")
    model = LlamaForCausalLM.from_pretrained(made / "model")
    assert torch.equal(student.stack.blocks[1].q_proj.weight, model.model.layers[2].self_attn.q_proj.weight)


def failure(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert run_command(lambda: main(arguments)) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and text.startswith("error: ")
    return text


def test_what_cannot_be_begun_is_named(
    made: Path, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*given_options(made, tmp_path / "run"), "--batch_rows", "4"]

    def shape(**changes: Any) -> list[str]:
        content = yaml.safe_load((made / "student.yaml").read_text())
        content["model"]["student"] |= changes
        (tmp_path / "shape.yaml").write_text(yaml.safe_dump(content))
        return [*given, "--student", str(tmp_path / "shape.yaml")]

    assert "is a run already" in failure([*given, "--run", str(start)], capsys)
    assert "transformer is not set" in failure(shape(transformer=None), capsys)
    assert "student.blocks=5, but the teacher has 4 layers" in failure(shape(blocks=5), capsys)
    wrong = {"feedforward": 95, "kv_heads": 2, "rope_theta": 10_000.0}
    assert "(96, 64), the student's wants (95, 64)" in failure(shape(transformer=wrong), capsys)
    assert "rope_theta is 9" in failure(shape(transformer={**wrong, "rope_theta": 9.0}), capsys)
    assert "no student's shape under model.student" in failure(shape(transformer={"width": 3}), capsys)
    assert "no student's shape under model.student" in failure([*given, "--student", str(tmp_path / "no.yaml")], capsys)
    assert "--align_tokens must be 0 or more" in failure([*given, "--align_tokens", "-1"], capsys)
    assert "no model at" in failure([*given, "--teacher", str(tmp_path / "nothing")], capsys)
    other = tmp_path / "other"
    torch.manual_seed(9)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(other)
    assert "not that of the cache's teacher" in failure([*given, "--teacher", str(other)], capsys)
    toy = write_toy_cache(tmp_path / "toy", rows=4)  # whose manifest names a teacher that nobody has
    assert "the cache's teacher 'toy' is not here" in failure([*given, "--cache", str(toy)], capsys)
    assert "is no cache" in failure([*given, "--cache", str(tmp_path)], capsys)
    assert not (tmp_path / "run").exists()


def test_the_file_is_written_last_that_makes_it_a_run(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an interrupted one left is written anew."""
    options = FromTeacherOptions(
        str(tmp_path / "run"), str(made / "cache"), str(made / "student.yaml"), align_tokens=0, batch_rows=4
    )

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("student.from_teacher.commit_json", full)
        with pytest.raises(OSError, match="No space"):
            from_teacher(options)
    assert not (tmp_path / "run" / "run.json").exists()
    from_teacher(options)
    load_student(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "from_teacher.json").read_text())["layers"] == [0, 2, 3]
