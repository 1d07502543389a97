"""The exported model beside the student: the same function, whatever is tied, scaled, padded, cut or cached."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers_export import shake
from helpers_student import toy_teacher
from helpers_transformer import shape_of
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from student.exporting.huggingface.modeling_distil_xlstm import DistilXLSTMCache, DistilXLSTMForCausalLM
from student.exporting.weights import MOST_DEVIATION, deviations, exported_config, exported_model, exported_tensors
from student.generate import generate
from student.model import DistilXLSTM, StudentConfig

V = 97
TRANSFORMER = {"transformer": shape_of(), "final_norm": "teacher"}
TRANSFORMER_WITHOUT_MAPS = {"transformer": shape_of(feature_map="none", qkv_bias=True, head_width=10)}
Pair = tuple[DistilXLSTM, DistilXLSTMForCausalLM]


def make(
    shape: dict[str, Any] | None = None, tied: bool = True, dtype: torch.dtype = torch.float32, **facts: Any
) -> Pair:
    torch.manual_seed(0)
    config = StudentConfig(**{"blocks": 2, "heads": 4, **(shape or {})})
    student = shake(DistilXLSTM(config, *toy_teacher(V, tied=tied, **facts), max_length=32))
    return student, exported_model(exported_config(student), exported_tensors(student, dtype))


@pytest.fixture(scope="module", params=["xlstm", "transformer", "transformer without maps"])
def pair(request: pytest.FixtureRequest) -> Pair:
    shapes = {"transformer": TRANSFORMER, "transformer without maps": TRANSFORMER_WITHOUT_MAPS}
    return make({"blocks": 3, **shapes.get(request.param, {})}, tied=False)


@pytest.fixture(scope="module")
def model(pair: Pair) -> DistilXLSTMForCausalLM:
    return pair[1]


def some_ids(rows: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(3, V, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("shape", "facts"),
    [
        ({}, {}),
        ({"final_norm": "teacher"}, {"norm_offset": 1.0, "norm_eps": 1e-3}),
        ({"slstm_at": ()}, {"logit_scale": 0.3}),
        ({"slstm_at": (0, 1), "conv_kernel": 2}, {"soft_cap": 2.0, "embedding_scale": 8.0}),
        ({"blocks": 3, "heads": 2, "mlstm_projection": 1.5, "mlstm_qkv_blocksize": 8, "slstm_feedforward": 1.0}, {}),
        (TRANSFORMER, {"soft_cap": 2.0, "norm_eps": 1e-3}),
        (TRANSFORMER_WITHOUT_MAPS, {"embedding_scale": 8.0, "norm_eps": 1e-3}),
        ({"transformer": shape_of(rope_theta=0.0, kv_heads=0, head_width=6)}, {}),
    ],
)
def test_logits_are_the_students(shape: dict[str, Any], facts: dict[str, Any], tied: bool) -> None:
    student, model = make(shape, tied, **facts)
    assert deviations(student, model).max() < 1e-5
    trained = sum(p.numel() for p in student.parameters())
    assert sum(p.numel() for p in model.parameters()) == trained + (1 if tied else 2) * V * 64


@pytest.mark.parametrize(
    ("shape", "names"),
    [({}, ("0.mixer.i_proj.weight", "0.mixer.f_proj.weight")), (TRANSFORMER, ("0.mixer.k_map", "1.mixer.k_map"))],
)
def test_a_tensor_in_the_wrong_place_is_noticed(shape: dict[str, Any], names: tuple[str, str]) -> None:
    student, _ = make(shape)
    config, tensors = exported_config(student), exported_tensors(student, torch.float32)
    first, second = (f"model.blocks.{name}" for name in names)
    tensors[first], tensors[second] = tensors[second], tensors[first]
    assert deviations(student, exported_model(config, tensors)).max() > MOST_DEVIATION
    del tensors[first]
    with pytest.raises(ValueError, match=first):
        exported_model(config, tensors)


@torch.no_grad()
def test_float64_shows_that_what_differs_is_rounding(pair: Pair) -> None:
    student, model = copy.deepcopy(pair[0]).double(), pair[1]
    ids_BT = some_ids(2, 100)
    exact_BTV = student(ids_BT).h_BTD @ student.head_VD.T
    rounded_BTV = pair[0].logits(pair[0](ids_BT).h_BTD)
    ours, theirs = (float((x - exact_BTV).abs().max()) for x in (model(ids_BT).logits, rounded_BTV))
    assert ours < 2 * theirs + 1e-6


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[150], [1, 149], [64, 64, 22], [3, 2, 70, 75], [148, 1, 1]])
def test_reading_in_pieces_is_reading_at_once(model: DistilXLSTMForCausalLM, cuts: list[int]) -> None:
    ids_BT = some_ids(2, 150)
    whole = model(ids_BT, use_cache=True)
    cache, parts = None, []
    for part in ids_BT.split(cuts, 1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole.logits, rtol=1e-4, atol=1e-4)
    assert cache is not None and cache.get_seq_length() == 150
    for state, expected in zip(cache.states, whole.past_key_values.states, strict=True):
        for name, value in state.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_the_cache_does_not_grow(model: DistilXLSTMForCausalLM) -> None:
    sizes = {model(some_ids(2, length), use_cache=True).past_key_values.nbytes() for length in (1, 2, 63, 200)}
    assert len(sizes) == 1 and model(some_ids(2, 5), use_cache=False).past_key_values is None


@torch.no_grad()
@pytest.mark.parametrize("where", ["left", "right", "middle", "everywhere"])
def test_padding_is_as_if_it_were_not_there(model: DistilXLSTMForCausalLM, where: str) -> None:
    texts = [some_ids(1, length, seed=length) for length in (90, 70, 2, 1)]
    keep_BT = torch.zeros(4, 100, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    for row, text in enumerate(texts):
        length = text.shape[1]
        places = {
            "left": torch.arange(100 - length, 100),
            "right": torch.arange(length),
            "middle": torch.cat([torch.arange(length - length // 2), torch.arange(100 - length // 2, 100)]),
            "everywhere": torch.randperm(100, generator=generator)[:length],
        }[where]
        keep_BT[row, places] = 1
    ids_BT = torch.randint(V, (4, 100), generator=generator)
    ids_BT[keep_BT.bool()] = torch.cat(texts, 1)[0]
    more_BT = some_ids(4, 5, seed=9)
    out = model(ids_BT, attention_mask=keep_BT, use_cache=True, output_hidden_states=True)
    after = model(more_BT, attention_mask=F.pad(keep_BT, (0, 5), value=1), past_key_values=out.past_key_values)
    for row, text in enumerate(texts):
        alone = model(text, use_cache=True, output_hidden_states=True)
        real_T = keep_BT[row].bool()
        torch.testing.assert_close(out.logits[row, real_T], alone.logits[0], rtol=1e-4, atol=1e-4)
        for hidden, expected in zip(out.hidden_states, alone.hidden_states, strict=True):
            torch.testing.assert_close(hidden[row, real_T], expected[0], rtol=1e-4, atol=1e-4)
        then = model(more_BT[row : row + 1], past_key_values=alone.past_key_values)
        torch.testing.assert_close(after.logits[row], then.logits[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_padding_after_what_was_read_keeps_it(model: DistilXLSTMForCausalLM) -> None:
    """A second call whose rows are padded, one of them wholly: the convolution must see across the padding."""
    first, second = some_ids(3, 10), some_ids(3, 6, seed=2)
    cache = model(first, use_cache=True).past_key_values
    keep = torch.tensor([[0] * 4 + [1] * 2, [0] * 6, [1] * 6])
    model(second, attention_mask=keep, past_key_values=cache, use_cache=True)
    third = some_ids(3, 4, seed=3)
    out = model(third, past_key_values=cache).logits
    for row in range(3):
        text = torch.cat([first[row], second[row][keep[row].bool()], third[row]])[None]
        torch.testing.assert_close(out[row], model(text).logits[0, -4:], rtol=1e-4, atol=1e-4)


def test_gradients_are_the_students(pair: Pair) -> None:
    student, model = pair[0], copy.deepcopy(pair[1]).train()
    ids_BT = some_ids(2, 80)
    loss = model(ids_BT, labels=ids_BT).loss
    expected = F.cross_entropy(student.logits(student(ids_BT[:, :-1]).h_BTD).flatten(0, 1), ids_BT[:, 1:].flatten())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    student.zero_grad()
    expected.backward()
    # A gradient is laid out as its weight is, but for norms, stored there without their 1.
    moved = copy.deepcopy(student)
    for parameter, source in zip(moved.parameters(), student.parameters(), strict=True):
        assert source.grad is not None
        parameter.data = source.grad
    found = dict(model.named_parameters())
    norms = {f"{n}.weight" for n, m in model.named_modules() if "norm" in n and not isinstance(m, torch.nn.RMSNorm)}
    without_one = norms & found.keys()
    for name, gradient in exported_tensors(moved, torch.float32).items():
        if name not in ("model.embed_tokens.weight", "lm_head.weight"):
            gradient = gradient - 1.0 if name in without_one else gradient
            torch.testing.assert_close(
                found[name].grad, gradient, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_gradients_with_padding_and_with_checkpointing(model: DistilXLSTMForCausalLM) -> None:
    model = copy.deepcopy(model).train()
    ids_BT, keep_BT = some_ids(2, 70), torch.ones(2, 70, dtype=torch.long)
    keep_BT[0, :66] = 0
    labels_BT = ids_BT.masked_fill(keep_BT == 0, -100)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(ids_BT, attention_mask=keep_BT, labels=labels_BT).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    assert len(plain) == len(list(model.parameters())) and all(torch.isfinite(g).all() for g in plain.values())
    model.gradient_checkpointing_enable()
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name])
    model.gradient_checkpointing_disable()
    ids_BT[0, :66] = 5
    torch.testing.assert_close(gradients(), plain)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_of_padded_rows_is_that_of_the_rows(model: DistilXLSTMForCausalLM, side: str) -> None:
    texts = [some_ids(1, length, seed=length)[0] for length in (30, 17)]
    ids_BT, labels_BT = torch.full((2, 30), 2), torch.full((2, 30), -100)
    for row, text in enumerate(texts):
        places = slice(30 - len(text), 30) if side == "left" else slice(0, len(text))
        ids_BT[row, places] = labels_BT[row, places] = text
    loss = model(ids_BT, attention_mask=(labels_BT >= 0).long(), labels=labels_BT).loss
    sums = [float(model(text[None], labels=text[None]).loss) * (len(text) - 1) for text in texts]
    assert float(loss) == pytest.approx(sum(sums) / (29 + 16), rel=1e-5)


def test_greedy_text_is_that_of_student_generate(pair: Pair) -> None:
    student, model = pair
    prompts = [[5, 6, 7], [8], list(range(10, 80))]
    width = max(map(len, prompts))
    ids_BT = torch.tensor([[2] * (width - len(p)) + p for p in prompts])
    keep_BT = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 2}
    together = model.generate(ids_BT, attention_mask=keep_BT, eos_token_id=[0, 2], **options)
    for row, prompt in enumerate(prompts):
        expected = list(generate(student, prompt, max_new_tokens=12, temperature=0, stop_ids={0, 2}))
        alone = model.generate(torch.tensor([prompt]), eos_token_id=[0, 2], **options)[0, len(prompt) :].tolist()
        assert [i for i in alone if i not in (0, 2)] == expected
        batched = together[row, width : width + len(expected)].tolist()
        assert batched == expected
    whole = model.generate(ids_BT, attention_mask=keep_BT, eos_token_id=[0, 2], use_cache=False, **options)
    assert torch.equal(whole, together)


def test_beams_carry_their_states_along(model: DistilXLSTMForCausalLM) -> None:
    ids_BT = some_ids(2, 9)
    options: dict[str, Any] = {"max_new_tokens": 10, "num_beams": 4, "num_return_sequences": 3, "do_sample": False}
    options |= {"pad_token_id": 2, "return_dict_in_generate": True, "output_scores": True}
    cached = model.generate(ids_BT, **options)
    whole = model.generate(ids_BT, use_cache=False, **options)
    assert torch.equal(cached.sequences, whole.sequences)
    torch.testing.assert_close(cached.sequences_scores, whole.sequences_scores, rtol=1e-4, atol=1e-4)
    moved = cached.beam_indices[:, 1:9]
    assert (moved[:, 1:] != moved[:, :-1]).any(), "no beam changed its place: nothing was tried"


@torch.no_grad()
def test_rows_of_a_cache_can_be_chosen_and_repeated(model: DistilXLSTMForCausalLM) -> None:
    ids_BT, more_BT = some_ids(3, 20), some_ids(3, 4, seed=2)

    def cache() -> DistilXLSTMCache:
        return model(ids_BT, use_cache=True).past_key_values

    expected = model(more_BT, past_key_values=cache()).logits
    order = torch.tensor([2, 0, 2])
    for move in (DistilXLSTMCache.reorder_cache, DistilXLSTMCache.batch_select_indices):
        chosen = cache()
        move(chosen, order)
        torch.testing.assert_close(model(more_BT[order], past_key_values=chosen).logits, expected[order])
    repeated = cache()
    repeated.batch_repeat_interleave(2)
    twice = model(more_BT.repeat_interleave(2, 0), past_key_values=repeated).logits
    torch.testing.assert_close(twice, expected.repeat_interleave(2, 0))
    emptied = cache()
    emptied.reset()
    fresh = model(more_BT, past_key_values=emptied).logits
    torch.testing.assert_close(fresh, model(more_BT).logits)
    with pytest.raises(ValueError, match="cannot forget"):
        cache().crop(-1)


def test_generation_goes_on_from_a_cache(model: DistilXLSTMForCausalLM) -> None:
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    first = model.generate(some_ids(2, 9), max_new_tokens=5, **options)
    longer = torch.cat([first.sequences, some_ids(2, 3, seed=4)], 1)
    again = model.generate(longer, past_key_values=first.past_key_values, max_new_tokens=5, **options)
    assert torch.equal(again.sequences, model.generate(longer, max_new_tokens=5, **options).sequences)
    assert again.past_key_values.get_seq_length() == again.sequences.shape[1] - 1


@torch.no_grad()
@pytest.mark.parametrize("shape", [{}, TRANSFORMER, TRANSFORMER_WITHOUT_MAPS])
def test_bfloat16_on_a_cpu(shape: dict[str, Any]) -> None:
    student, model = make({"blocks": 4, **shape}, tied=False, dtype=torch.bfloat16)
    ids_BT = some_ids(2, 120)
    out = model(ids_BT, use_cache=True)
    expected_BTV = student.logits(student(ids_BT).h_BTD)
    assert model.dtype == torch.bfloat16 and out.logits.dtype == torch.float32
    assert float((out.logits - expected_BTV).norm() / expected_BTV.norm()) < 0.03
    states = [(k, v.dtype) for s in out.past_key_values.states for k, v in s.items()]
    assert {dtype for name, dtype in states if name not in ("conv", "position")} == {torch.float32}
    step = model(some_ids(2, 1), past_key_values=out.past_key_values).logits
    whole = model(torch.cat([ids_BT, some_ids(2, 1)], 1)).logits[:, -1:]
    assert float((step - whole).norm() / whole.norm()) < 0.03
    assert model.generate(ids_BT, max_new_tokens=4, eos_token_id=None, do_sample=False).shape == (2, 124)


@torch.no_grad()
def test_what_callers_may_pass(model: DistilXLSTMForCausalLM) -> None:
    ids_BT = some_ids(2, 12)
    whole = model(ids_BT).logits
    torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(ids_BT)).logits, whole)
    torch.testing.assert_close(model(ids_BT, logits_to_keep=3).logits, whole[:, -3:])
    torch.testing.assert_close(model(ids_BT, logits_to_keep=torch.tensor([1, 5])).logits, whole[:, [1, 5]])
    torch.testing.assert_close(model(ids_BT, return_dict=False)[0], whole)
    chunked = copy.deepcopy(model)
    for block in chunked.model.blocks:
        block.mixer.chunk = 5  # an mLSTM's; decides nothing
    torch.testing.assert_close(chunked(ids_BT).logits, whole, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="DynamicCache: this model needs its own"):
        model(ids_BT, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 5\)"):
        model(ids_BT, attention_mask=torch.ones(2, 5))


@pytest.mark.parametrize("shape", [{}, TRANSFORMER, TRANSFORMER_WITHOUT_MAPS])
def test_a_model_can_begin_from_nothing_and_learn(shape: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = exported_config(make(shape)[0])
    model = DistilXLSTMForCausalLM(config).train()
    ids_BT = some_ids(4, 24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = model(ids_BT, labels=ids_BT).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] < 1.1 * torch.tensor(V).log() and losses[-1] < 0.5 * losses[0]


def test_an_unknown_kind_of_block_is_named() -> None:
    config = exported_config(make()[0])
    config.block_types = ["slstm", "attention"]
    with pytest.raises(ValueError, match="'attention'; this code knows mlstm, slstm, transformer_mlstm"):
        DistilXLSTMForCausalLM(config)
