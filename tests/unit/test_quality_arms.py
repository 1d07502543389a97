"""Manifests of experiments: every one loads, trains what it says, and is served by the dump it names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from benchmarks.quality import arms as module
from benchmarks.quality.arms import BUDGETS, EXPERIMENTS, QUESTIONS, Arm, chosen, load_arm, load_arms
from benchmarks.quality.caches import needs
from benchmarks.quality.trial import Trial
from pipeline.config import parse_into
from pipeline.errors import UserError
from student.__main__ import main as train
from student.cache_view import CacheView
from student.loss_config import LossConfig
from teacher_dump.settings import DumpConfig

ARMS = load_arms()
NOWHERE = Path("nowhere")


def trial(arm: Arm, budget: str = "screen") -> Trial:
    return Trial(arm, 3, BUDGETS[budget], NOWHERE / "cache", NOWHERE, NOWHERE, NOWHERE / "run")


def dump(name: str) -> DumpConfig:
    return parse_into(DumpConfig, "dump", "", "--manifest", ["--manifest", f"manifests/dumps/{name}.yaml"])


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", ARMS)
def test_every_option_exists_and_its_dump_serves_it(name: str, budget: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:  # the parser prints what it made of the words
        train([*trial(ARMS[name], budget).arguments(), "--print_config"])
    assert ended.value.code == 0
    found = yaml.safe_load(capsys.readouterr().out)
    assert (found["seed_everything"], found["data"]["seed"], found["cache"]) == (3, 3, "nowhere/cache")
    assert found["trainer"]["max_epochs"] == BUDGETS[budget].passes
    loss, cut = LossConfig(**found["model"]["loss"]), dump(ARMS[name].cache)
    draws = cut.tail_samples if found["data"]["k"] is None else None
    loss.check(cut.taus, cut.window > 0, cut.block > 0, found["model"]["student"]["blocks"] // 2, draws)
    spec = cut.spec(facts())
    CacheView(found["data"]["k"], found["data"]["hidden_window"]).check(spec, "the dump")
    changed = {key.removeprefix("model.loss.") for key in ARMS[name].overrides if key.startswith("model.loss.")}
    assert changed <= vars(loss).keys()


def facts() -> object:
    from helpers_student import toy_teacher

    return toy_teacher(49_152, 576)[0]


def test_arms_cover_what_is_asked() -> None:
    assert {arm.overrides.get("data.k", 128) for arm in ARMS.values() if "k" in arm.question} == {8, 16, 32, 64, 128}
    assert [name for name, arm in ARMS.items() if arm.teacher_in_loop] == ["online"]
    for name in QUESTIONS:
        if name != "start":
            assert any(name in arm.question for arm in ARMS.values()), name
    assert list(ARMS)[0] == "ce"  # references come first: differences need them


def test_dumps_cut_the_same_rows() -> None:
    """Arms are compared on the same tokens in the same order, whichever cache they read."""
    cuts = [dump(name) for name in dict.fromkeys(arm.cache for arm in ARMS.values())]
    assert len(cuts) == 3
    for field in ("corpus", "teacher", "tokens_per_shard", "length", "packing", "separator"):
        assert len({str(getattr(cut, field)) for cut in cuts}) == 1, field
    assert len({cut.spec(facts()).rows_per_group for cut in cuts}) == 1  # type: ignore[arg-type]


def test_caches_are_named_after_what_arms_train_on() -> None:
    found = needs([ARMS["ce"], ARMS["paper"]], BUDGETS["screen"], Path("scratch"))
    assert list(found) == ["experiment", "experiment-hidden", "experiment-other"]
    shards = {name: (need.shards, need.heldout) for name, need in found.items()}
    assert shards == {"experiment": (16, 1), "experiment-hidden": (16, 0), "experiment-other": (1, 1)}
    words = found["experiment"].command()
    assert "--shards=16" in words and "--cache=scratch/caches/screen/experiment" in words
    assert not found["experiment"].is_there()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("# a\nquestion: signal\nlr: 1\n", "lr is no field of an arm"),
        ("question: signal\n", "does not say in a comment"),
        ("# a\nbudget: screen\n", "question is missing"),
        ("# a\nquestion: size\n", "question 'size' is unknown"),
        ("# a\nquestion: signal\ncache: none\n", "cache 'none' is no file"),
        ("# a\nquestion: signal\nconfig: [none.yaml]\n", "config 'none.yaml' is unknown"),
        ("# a\nquestion: signal\nbudget: huge\n", "budget 'huge' must be"),
        ("# a\nquestion: signal\nstart: teacher\n", "start is 'teacher', not of the type dict"),
        ("# a\n- question\n", "must hold fields"),
        ("# a\nquestion: [signal\n", "is no YAML"),
    ],
)
def test_a_wrong_manifest_is_told(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "arm.yaml").write_text(text)
    with pytest.raises(UserError, match=told):
        load_arm(tmp_path / "arm.yaml")


def test_a_question_needs_its_reference(tmp_path: Path) -> None:
    (tmp_path / "tail-k8.yaml").write_text((EXPERIMENTS / "tail-k8.yaml").read_text())
    with pytest.raises(UserError, match="mix-0.9.yaml is missing"):
        load_arms(tmp_path)


def test_figures_are_out_of_date_when_what_they_depend_on_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    arm, budget = ARMS["ce"], BUDGETS["screen"]
    before = arm.settings(budget)
    assert replace(arm, about="other words", question=("mix",)).settings(budget) == before
    others = [
        replace(arm, overrides={**arm.overrides, "data.k": 4}).settings(budget),
        replace(arm, cache="experiment-draws").settings(budget),
        replace(arm, start={"align_tokens": 1000}).settings(budget),
        replace(arm, teacher_in_loop=True).settings(budget),
        arm.settings(replace(budget, shards=17)),
        arm.settings(BUDGETS["headline"]),
    ]
    original = module._read
    monkeypatch.setattr(module, "_read", lambda path: {**original(path), "added": 1})
    others.append(arm.settings(budget))
    assert len({before, *others}) == 1 + len(others)


def test_choosing() -> None:
    screen, headline = BUDGETS["screen"], BUDGETS["headline"]
    assert [arm.name for arm in chosen(ARMS, ["tail-k8", "ce"], None, screen)] == ["tail-k8", "ce"]
    of_k = [arm.name for arm in chosen(ARMS, None, "k", screen)]
    assert of_k[0] == "mix-0.9" and set(of_k) == {"mix-0.9", *(f"tail-k{k}" for k in (8, 16, 32, 64))}
    assert {arm.budget for arm in chosen(ARMS, None, None, headline)} == {"headline"}
    assert len(chosen(ARMS, None, None, screen)) == len(ARMS)
    with pytest.raises(UserError, match="--arms ec: no such file"):
        chosen(ARMS, ["ec"], None, screen)
    with pytest.raises(UserError, match="--question what: known are signal"):
        chosen(ARMS, None, "what", screen)
