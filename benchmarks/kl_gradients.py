"""How far the gradient of each divergence is from that of the KL over the whole vocabulary, on a real teacher and text.

    python -m benchmarks.kl_gradients --model data/smollm2-135m --text data/enwik8.jsonl.zst

The teacher reads rows of 512 tokens. The student is the same model reading 8 tokens at a time: its distributions are
those of a language model that knows less. Positions at which it has read 5 to 8 tokens are used. All logits are known,
so that the truth is too; K ids, tails and draws are made from them, and the gradient to the student's last hidden
state is `fused_kd_sums`'s: what training gets. All as shares of the true gradient's size (root mean square):

    bias, noise      of one position: distance of the mean over draws from the truth, and spread around that mean
    layer_bias, ..   of the gradient of a weight matrix that made those hidden states from themselves, summed over all
                     N positions: noise averages over a batch (as 1/sqrt(N)), bias does not
    layer_cosine     between that matrix's mean gradient and the true one

Legend: N positions, V vocabulary, D width, M draws, S repetitions.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measured import RESULTS, Row, device_name, table, write_results
from student.losses.fused import Head, TailDraws, TeacherTopK, fused_kd_sums
from student.losses.sparse_kd import Divergence
from teacher_dump.corpus import CorpusConfig, describe_corpus, read_range

ROW_TOKENS, STUDENT_TOKENS = 512, 8
CHUNK = 128
NORMALISED = "sampled, normalised"
"""Self-normalised importance weights, which training does not use: shown beside those that it does."""


@dataclass(frozen=True)
class Pair:
    """Teacher and student at N positions, and the head they share."""

    teacher_ND: Tensor
    student_ND: Tensor
    head_VD: Tensor

    def chunks(self, tau: float) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Positions, the teacher's logits (C, V) and the student's log q (C, V) at tau."""
        for start in range(0, len(self.teacher_ND), CHUNK):
            at = slice(start, start + CHUNK)
            log_q_CV = (self.student_ND[at] @ self.head_VD.T / tau).log_softmax(-1)
            yield at, self.teacher_ND[at] @ self.head_VD.T, log_q_CV


def read_pair(model: str, text: Path, rows: int, device: torch.device) -> Pair:
    """Last hidden states of the model on `rows` rows of the corpus, with its whole context and with little of it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    corpus = CorpusConfig(str(text), heldout_fraction=0.0)
    files = describe_corpus(corpus, Path())
    ids: list[int] = []
    for document in read_range(corpus, files, 0, sum(file.extent for file in files)):
        ids += tokenizer(document.text)["input_ids"]
        if len(ids) >= rows * ROW_TOKENS:
            break
    ids_BT = torch.tensor(ids[: rows * ROW_TOKENS], device=device).view(rows, ROW_TOKENS)
    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, use_safetensors=True)
    network = network.to(device)
    with torch.no_grad():
        whole_ND = network.model(ids_BT).last_hidden_state.flatten(0, 1)
        little_ND = network.model(ids_BT.view(-1, STUDENT_TOKENS)).last_hidden_state.flatten(0, 1)
    keep_T = torch.arange(ROW_TOKENS, device=device)
    keep_N = ((keep_T >= STUDENT_TOKENS) & (keep_T % STUDENT_TOKENS >= STUDENT_TOKENS // 2)).repeat(rows)
    return Pair(whole_ND[keep_N].clone(), little_ND[keep_N].clone(), network.lm_head.weight.detach())


def true_gradient(pair: Pair, tau: float) -> tuple[Tensor, float]:
    """(q - p) head (N, D), the gradient of sum_N tau KL(p_tau || q_tau) to the student's h; and the mean KL."""
    parts, kl = [], 0.0
    for _, teacher_CV, log_q_CV in pair.chunks(tau):
        log_p_CV = (teacher_CV / tau).log_softmax(-1)
        p_CV = log_p_CV.exp()
        parts.append((log_q_CV.exp() - p_CV) @ pair.head_VD)
        kl += float((p_CV * (log_p_CV - log_q_CV)).sum())
    return torch.cat(parts), kl / len(pair.teacher_ND)


def top_k(pair: Pair, k: int, tau: float, draws: int, generator: torch.Generator) -> tuple[TeacherTopK, float]:
    """What a cache would hold of the teacher, and the mean tail mass at tau; `draws` (M times S) may be 0."""
    parts: list[tuple[Tensor, ...]] = []
    mass = 0.0
    for _, teacher_CV, _ in pair.chunks(tau):
        logits_CK, ids_CK = teacher_CV.topk(k)
        tail_CV = teacher_CV.scatter(1, ids_CK, -math.inf)
        log_tail_C = (tail_CV / tau).logsumexp(-1)
        drawn_CM = tail_CV.softmax(-1).multinomial(max(draws, 1), replacement=True, generator=generator)
        drawn = drawn_CM, teacher_CV.gather(1, drawn_CM), tail_CV.logsumexp(-1)
        parts.append((ids_CK, logits_CK, log_tail_C, *drawn))
        mass += float((log_tail_C - (teacher_CV / tau).logsumexp(-1)).exp().sum())
    ids, logits, log_tail, *drawn_N = (torch.cat(part) for part in zip(*parts, strict=True))
    return TeacherTopK(ids, logits, log_tail, TailDraws(*drawn_N)), mass / len(ids)


def split_draws(teacher: TeacherTopK, count: int, tau: float, normalise: bool) -> Iterator[TeacherTopK]:
    """The teacher with `count` of its draws at a time; `normalise`: weights that sum to the tail's mass, as other
    log_tail at tau 1 make them."""
    assert teacher.draws is not None
    for start in range(0, teacher.draws.ids_NM.shape[1], count):
        own = slice(start, start + count)
        ids_NM, logits_NM = teacher.draws.ids_NM[:, own], teacher.draws.logits_NM[:, own]
        log_tail_1_N = teacher.draws.log_tail_1_N
        if normalise:
            log_tail_1_N = teacher.log_tail_N - (logits_NM / tau - logits_NM).logsumexp(1) + math.log(count)
        yield replace(teacher, draws=TailDraws(ids_NM, logits_NM, log_tail_1_N))


def found_gradient(pair: Pair, teacher: TeacherTopK, tau: float, divergence: Divergence) -> Tensor:
    """As training gets it, of the same sum as `true_gradient`."""
    h_ND = pair.student_ND.clone().requires_grad_()
    target_N = torch.zeros(len(h_ND), dtype=torch.int64, device=h_ND.device)
    sums = fused_kd_sums(h_ND, Head(pair.head_VD), target_N, teacher, 0.0, tau, tau, chunk_rows=CHUNK, kl=divergence)
    (gradient_ND,) = torch.autograd.grad(sums.total, h_ND)
    return gradient_ND


def compare(found_SND: Tensor, truth_ND: Tensor, h_ND: Tensor) -> Row:
    """Bias and noise as shares of the truth's size; of S = 1 all is bias."""
    repeats = len(found_SND)

    def parts(found_SX: Tensor, truth_X: Tensor) -> tuple[float, float]:
        mean_X, size = found_SX.mean(0), float(truth_X.square().sum())
        noise = float((found_SX - mean_X).square().sum()) / (repeats - 1) / size if repeats > 1 else 0.0
        bias = float((mean_X - truth_X).square().sum()) / size - noise / repeats
        return math.sqrt(max(0.0, bias)), math.sqrt(noise)

    bias, noise = parts(found_SND, truth_ND)
    layer_SDD, true_DD = torch.einsum("snd,ne->sde", found_SND, h_ND), truth_ND.T @ h_ND
    layer_bias, layer_noise = parts(layer_SDD, true_DD)
    mean_DD = layer_SDD.mean(0)
    cosine = float((mean_DD * true_DD).sum() / mean_DD.norm() / true_DD.norm())
    return {
        "bias": bias,
        "noise": noise,
        "layer_bias": layer_bias,
        "layer_noise": layer_noise,
        "layer_cosine": cosine,
    }


def measure(pair: Pair, ks: list[int], taus: list[float], draws: list[int], repeats: int) -> Iterator[Row]:
    """A row for every divergence, K, tau and number of draws."""
    generator = torch.Generator(pair.head_VD.device).manual_seed(0)
    for tau in taus:
        truth_ND, kl = true_gradient(pair, tau)
        for k in ks:
            teacher, mass = top_k(pair, k, tau, 0, generator)
            about = {"tau": tau, "k": k, "tail_mass": mass, "kl": kl}
            exact: tuple[Divergence, ...] = ("tail", "renormalised")
            for divergence in exact:
                found_ND = found_gradient(pair, teacher, tau, divergence)
                yield {**about, "divergence": divergence, **compare(found_ND[None], truth_ND, pair.student_ND)}
            for count in draws:
                several, _ = top_k(pair, k, tau, count * repeats, generator)
                for name in ("sampled", NORMALISED)[: 1 if tau == 1 else 2]:  # at tau 1 they are the same
                    parts = [
                        found_gradient(pair, drawn, tau, "sampled")
                        for drawn in split_draws(several, count, tau, name == NORMALISED)
                    ]
                    found = compare(torch.stack(parts), truth_ND, pair.student_ND)
                    yield {**about, "divergence": name, "draws": count, **found}


def main(words: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="data/smollm2-135m", help="folder of the teacher")
    options.add_argument("--text", type=Path, default=Path("data/enwik8.jsonl.zst"), help="corpus")
    options.add_argument("--rows", type=int, default=4, help=f"rows of {ROW_TOKENS} tokens")
    options.add_argument("--ks", nargs="+", type=int, default=[16, 64, 128])
    options.add_argument("--taus", nargs="+", type=float, default=[1.0, 1.5, 2.0])
    options.add_argument("--draws", nargs="+", type=int, default=[16])
    options.add_argument("--repeats", type=int, default=3, help="draws of all positions, to tell bias from noise")
    options.add_argument("--results", type=Path, default=RESULTS, help="folder of kl_gradients.json")
    arguments = options.parse_args(words)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pair = read_pair(arguments.model, arguments.text, arguments.rows, device)
    rows = []
    for row in measure(pair, arguments.ks, arguments.taus, arguments.draws, arguments.repeats):
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    columns = ("tau", "k", "divergence", "draws", "tail_mass", "bias", "noise", "layer_bias", "layer_noise")
    print(table(rows, (*columns, "layer_cosine")))
    settings = {"model": Path(arguments.model).name, "text": arguments.text.name, "positions": len(pair.teacher_ND)}
    settings |= {"repeats": arguments.repeats}
    place = write_results("kl_gradients", rows, device=device_name(), folder=arguments.results, settings=settings)
    print(f"written to {place}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
