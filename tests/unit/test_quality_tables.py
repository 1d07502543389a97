"""Tables and report of made-up figures: the arithmetic of differences and noise, and a page that holds no others."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from benchmarks.measured import Row
from benchmarks.quality.report import write_report
from benchmarks.quality.tables import (
    KL,
    Noise,
    Spread,
    cost_table,
    depth_table,
    difference,
    long_table,
    noise,
    of_budget,
    question_table,
    teacher_row,
    tokens_text,
    verdicts,
)
from pipeline.errors import UserError


def row(arm: str, seed: int, kl: float, question: list[str], **changes: object) -> Row:
    figures = {
        "ce": kl + 3.0, "perplexity": math.exp(kl + 3.0), "bits_per_byte": 1.5, "kl_full": kl, "kl_k1": 0.9 * kl,
        "top1_agreement": 0.5, "targets": 262_144,
    }  # fmt: skip
    seconds = {"prepare": 1.0, "train": 10.0, "save": 1.0, "evaluate": 3.0, "total": 15.0}
    return {
        "arm": arm, "seed": seed, "budget": "screen", "question": question, "heldout": figures,
        "other": {**figures, "ce": kl + 4.0}, "by_position": [[0, 8.0], [1, 6.0], [2, 5.0]], "seconds": seconds,
        "tokens": 4_194_304, "steps": 256, "trainable_parameters": 12_345_678, "tokens_per_s": 400_000.0,
        "peak_gb": 3.0, "device": "some GPU", **changes,
    }  # fmt: skip


ROWS = [
    *(row("ce", seed, kl, ["signal"]) for seed, kl in ((0, 1.50), (1, 1.54))),
    *(row("delta", seed, kl, ["signal", "mix"]) for seed, kl in ((0, 1.20), (1, 1.22))),
    *(row("mix-0.9", seed, kl, ["signal", "mix"]) for seed, kl in ((0, 1.21), (1, 1.205))),
    row("mix-0.1", 2, 1.4, ["mix"]),
    row("online", 0, 1.0, ["signal"], budget="headline"),
    {"arm": "paper", "seed": 0, "budget": "screen", "error": "it failed"},
]
TEACHER: Row = {**row("teacher", 0, 0.0, []), "budget": "teacher"}


def test_differences_are_taken_seed_by_seed() -> None:
    arms = of_budget(ROWS, "screen")
    assert list(arms) == ["ce", "delta", "mix-0.9", "mix-0.1"]
    found = difference(arms["delta"], arms["ce"], KL)
    assert found is not None and found.seeds == 2
    assert found.mean == pytest.approx(-0.31) and found.deviation == pytest.approx(math.sqrt(2) * 0.01)
    assert difference(arms["mix-0.1"], arms["delta"], KL) is None  # no seed in common
    assert Spread.of([1.0]).text() == "1.000" and Spread.of([1.0, 3.0]).text(1, sign=True) == "+2.0 ± 1.4"


def test_noise_is_pooled_over_the_arms_of_a_question() -> None:
    # Differences by seed: signal: delta -0.30, -0.32; mix-0.9 -0.29, -0.335; mix: mix-0.9 +0.01, -0.015.
    for question, gaps in (("signal", (0.02, 0.045)), ("mix", (0.025,))):
        found = noise(ROWS, "screen", question, KL)
        assert found is not None and found.freedom == len(gaps)
        assert found.deviation == pytest.approx(math.sqrt(sum(gap**2 / 2 for gap in gaps) / len(gaps)))
    assert noise(ROWS, "headline", "signal", KL) is None and noise(ROWS, "screen", "k", KL) is None


def test_few_seeds_need_larger_differences() -> None:
    assert Noise(0.1, 2).limit(4) == pytest.approx(4.30 * 0.1 / 2)
    assert Noise(0.1, 1).limit(1) > Noise(0.1, 2).limit(1) > Noise(0.1, 13).limit(1) == Noise(0.1, 99).limit(1)


def test_a_table_has_the_reference_first_then_the_nearest() -> None:
    lines = question_table(ROWS, "screen", "mix")
    assert [line["arm"] for line in lines] == ["delta", "mix-0.9", "mix-0.1"]
    assert [line["KL - ref"] for line in lines] == ["reference", "-0.0025 ± 0.0177", "-"]
    assert lines[0]["KL"] == "1.210 ± 0.014" and lines[2]["KL"] == "1.400" and lines[2]["seeds"] == 1
    assert lines[0]["other CE"] == "5.210 ± 0.014" and lines[0]["top-1"] == "50.0%"
    assert question_table(ROWS, "screen", "k") == []  # its reference alone is no table
    assert question_table(ROWS, "headline", "signal") == []  # nor is any other arm alone


def test_tokens_of_all_phases_are_told() -> None:
    assert tokens_text(ROWS[0]) == "4.2 M"
    assert tokens_text({**ROWS[0], "tokens_before": 3_000_000, "align_tokens": 2_000_000}) == "7.2 M + 2.0 M"


def test_costs() -> None:
    line = cost_table(ROWS, "screen")[0]
    assert (line["arm"], line["train"], line["start"], line["tokens/s"]) == ("ce", 10.0, 0.0, 400_000)
    assert line["cache B/token"] == "-"
    lines = cost_table([{**ROWS[0], "workers": 4, "gpus": 2, "graphs": True}, ROWS[1]], "screen")
    assert [(line["at once"], line["graphs"], line["seeds"]) for line in lines] == [("2", "yes", 1), ("-", "-", 1)]
    told = [{**each, "cache_bytes": 55.25 + each["seed"]} for each in ROWS]
    assert cost_table(told, "screen")[0]["cache B/token"] == 55.8  # of seeds 0 and 1


LONG = {
    "kl_full": 1.1,
    "ce": 4.1,
    "by_position": [[0, 9.0, 8.0, 2.0], [1, 5.0, 4.5, 1.5], [2, 4.0, 3.5, 1.0], [4, 3.0, 2.5, 0.5]],
}


def test_longer_rows_are_told_for_the_last_positions() -> None:
    own = [row("a", seed, 1.0, ["start"], long={**LONG, "kl_full": 1.1 + seed}) for seed in (0, 1)]
    (line,) = long_table([*ROWS, *own], "screen")
    assert (line["arm"], line["seeds"], line["KL"], line["CE"]) == ("a", 2, "1.600 ± 0.707", "4.100 ± 0.000")
    assert [line[f"KL from {first}"] for first in (1, 2, 4)] == ["1.500", "1.000", "0.500"]
    assert (line["CE from 4"], line["teacher from 4"]) == ("3.000", "2.500") and "KL from 0" not in line
    assert long_table(ROWS, "screen") == []


def test_a_page_tells_of_longer_rows_and_of_what_an_uncut_arm_is_trained(tmp_path: Path) -> None:
    cut = row("a", 0, 1.0, ["start"], long=LONG, share=0.25, tokens=1_000_000, steps=64)
    text = write_report([TEACHER, *ROWS, cut], [], tmp_path).read_text()
    assert "4.2 million token positions, 256 steps, 5 arms" in text
    assert "| `a` | 1 | 1.100 | 4.100 | 1.500 | 5.000 | 4.500 |" in text and "in longer rows" in text


def test_a_page_tells_of_further_judges(tmp_path: Path) -> None:
    whose = ("student", "untrained", "mean_teacher_map", "recency", "uniform")
    mean = {sinks: {"jensen_shannon": dict.fromkeys(whose, 0.25)} for sinks in ("keep", "drop")}
    answers = {"piqa": {"measure": "acc", "acc": 0.625}}
    depth = [{"from": 0.0, "to": 0.5, **mean}, {"from": 0.5, "to": 1.0, **mean}]
    judged = {
        "zero_shot": {"tasks": answers, "teacher": answers, "chance": {"piqa": 0.5}},
        "attention": {"mean": mean, "depth": depth},
    }
    plain = write_report([TEACHER, *ROWS], [], tmp_path).read_text()
    assert plain.count("Nothing was measured yet.") == 4
    (tmp_path / "results" / f"attention-{ROWS[0]['arm']}-0.png").write_bytes(b"a picture")
    text = write_report([TEACHER, {**ROWS[0], **judged}, *ROWS[1:]], [], tmp_path).read_text()
    assert "62.5" in text and "50.0" in text and "0.2500" in text and "Nothing was measured yet." not in text
    assert f"results/attention-{ROWS[0]['arm']}-0.png" in text and "| ce, untrained | 0.250 | 0.250 |" in text


def test_attention_by_depth_has_baselines_once() -> None:
    """Fresh weights are those of a shape; a student without maps in a depth group has no figure there."""

    def judged(arm: str, student: list[float | None], untrained: float) -> Row:
        others = {"untrained": untrained, "mean_teacher_map": 0.1, "recency": 0.2, "uniform": 0.3}
        groups = [others if value is None else {"student": value, **others} for value in student]
        depth = [
            {"from": i / len(groups), "to": (i + 1) / len(groups), "keep": {"jensen_shannon": group}}
            for i, group in enumerate(groups)
        ]
        return row(arm, 0, 1.0, ["signal"], attention={"depth": depth})

    lines = depth_table(
        [judged("a", [None, 0.5], 0.4), judged("b", [0.6, 0.7], 0.4), judged("c", [0.8, 0.9], 0.45)], "screen"
    )
    assert [list(line.values()) for line in lines] == [
        ["a", "-", "0.500"], ["b", "0.600", "0.700"], ["c", "0.800", "0.900"],
        ["a, untrained", "0.400", "0.400"], ["c, untrained", "0.450", "0.450"],
        ["mean teacher map", "0.100", "0.100"], ["recency", "0.200", "0.200"], ["uniform", "0.300", "0.300"],
    ]  # fmt: skip
    assert list(lines[0])[1:] == ["0% to 50%", "50% to 100%"]


def test_a_verdict_needs_more_than_the_noise() -> None:
    told = "against `ce`: lower with `delta` (-0.3100), `mix-0.9` (-0.3125)."
    assert verdicts(ROWS, "screen", "signal") == f"KL to the teacher, {told} Cross-entropy, {told}"
    assert "KL to the teacher, against `delta`: not told apart with `mix-0.9` (-0.0025)." in verdicts(
        ROWS, "screen", "mix"
    )
    assert verdicts(ROWS, "headline", "signal") == ""
    worse = [*ROWS, *(row("ce-2", seed, 1.7, ["signal"]) for seed in (0, 1))]
    assert "; higher with `ce-2` (+0.1800)." in verdicts(worse, "screen", "signal")


def test_the_report_is_written_from_rows_alone(tmp_path: Path) -> None:
    curves = [{"arm": "ce", "seed": 0, "budget": "screen", "step": [10, 20], "ce": [9.0, 8.0]}]
    page = write_report([TEACHER, *ROWS], curves, tmp_path)
    text = page.read_text()
    assert "$" not in text and "Trained parameters: 12,345,678;" in text and "some GPU" in text
    for told in (
        "262,144 held-out targets",
        "4.2 million token positions, 256 steps, 4 arms, seeds 0, 1, 2",
        "signal 0.0246 and 0.0246 (2)",
        "- **What of the teacher helps?** KL to the teacher, against `ce`: lower with",
        "| `online` | 8.000 | 6.000 | 5.000 |",
    ):
        assert told in text
    assert "| `delta` | 2 | 12.3 M | 4.2 M | 1.210 ± 0.014 | -0.3100 ± 0.0141 |" in text
    assert "3.000 nats (20.1 perplexity" in text and "it failed" not in text
    pictures = re.findall(r"\]\((results/[^)]+\.png)\)", text)
    assert sorted(pictures) == sorted(f"results/{path.name}" for path in (tmp_path / "results").iterdir())
    assert {"results/signal-screen.png", "results/curves-screen.png", "results/mix-screen.png"} <= set(pictures)
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    assert "## How many ids does a cache need?" not in text  # nothing was measured
    (tmp_path / "results" / "k-screen.png").write_bytes(b"of an earlier page")
    (tmp_path / "results" / "attention-ce-3.png").write_bytes(b"a user's")
    again = write_report([TEACHER, *ROWS], curves, tmp_path).read_text()
    assert again == text and (tmp_path / "results" / "attention-ce-3.png").is_file()
    assert not (tmp_path / "results" / "k-screen.png").exists()


def test_without_figures_there_is_no_page(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no figures to report yet"):
        write_report([TEACHER, ROWS[-1]], [], tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_small_budget_has_a_teacher_of_its_own() -> None:
    small = {**TEACHER, "budget": "small"}
    assert teacher_row([TEACHER, small], "small") is small
    assert teacher_row([TEACHER, small], "screen") is TEACHER
