"""Manifests of experiments: every one loads, trains what it says, and is served by the dump it names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from benchmarks.quality import arms as module
from benchmarks.quality.arms import BUDGETS, EXPERIMENTS, LONG_CACHE, QUESTIONS, Arm, chosen, load_arm, load_arms
from benchmarks.quality.caches import needs
from benchmarks.quality.trial import Trial
from pipeline.config import parse_into
from pipeline.errors import UserError
from student.__main__ import main as train
from student.data.cache_view import CacheView
from student.training.loss_config import LossConfig
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


def test_the_arm_named_recommended_is_the_preset(capsys: pytest.CaptureFixture[str]) -> None:
    """What its row says is what a user of the preset gets, though the experiments have a base of their own."""
    preset = ["--config", "manifests/students/recommended.yaml", "--cache=nowhere", "--run=nowhere"]
    found = []
    for words in (preset, trial(ARMS["recommended"], "headline").arguments()):
        with pytest.raises(SystemExit):
            train([*words, "--print_config"])
        found.append(yaml.safe_load(capsys.readouterr().out))
    assert ARMS["recommended"].budget == "both"
    for parsed in found:
        parsed["data"].pop("seed")
        parsed["model"].pop("graphs")  # the runner's own option: it changes times only
        for name in ("chunk_rows", "attention_sinks", "attention_sign", "attention_normalise_rows"):
            parsed["model"]["loss"].pop(name)  # of speed, and of a term whose weight is 0 in both
    assert found[0]["model"]["loss"]["gamma"] == 0
    for part in ("model", "data"):
        assert found[0][part] == found[1][part]
    same = ("max_epochs", "precision", "gradient_clip_val", "accumulate_grad_batches")
    assert [found[0]["trainer"][name] for name in same] == [found[1]["trainer"][name] for name in same]


def test_arms_cover_what_is_asked() -> None:
    assert {arm.overrides.get("data.k", 128) for arm in ARMS.values() if "k" in arm.question} == {8, 16, 32, 64, 128}
    assert [name for name, arm in ARMS.items() if arm.teacher_in_loop] == ["online", "start-aligned-online"]
    for name in QUESTIONS:
        if name != "start":
            assert any(name in arm.question for arm in ARMS.values()), name
    assert list(ARMS)[0] == "ce"  # references come first: differences need them


def test_dumps_cut_the_same_rows() -> None:
    """Arms are compared on the same tokens in the same order, whichever cache they read."""
    cuts = {name: dump(name) for name in dict.fromkeys(arm.cache for arm in ARMS.values())}
    assert len(cuts) == 5
    for field in ("corpus", "teacher", "tokens_per_shard", "packing", "separator"):
        assert len({str(getattr(cut, field)) for cut in cuts.values()}) == 1, field
    # Groups of as many tokens are shuffled alike, so that the same text comes first in longer rows too.
    assert len({cut.spec(facts()).rows_per_group * cut.length for cut in cuts.values()}) == 1  # type: ignore[arg-type]
    assert {name: cut.length for name, cut in cuts.items()} == {**dict.fromkeys(cuts, 512), LONG_CACHE: 2048}


def test_the_arms_of_two_phases_differ_in_the_rows_of_the_last_one_alone() -> None:
    long, short = ARMS["start-aligned-long"], ARMS["start-aligned-short"]
    assert long.before is not None and long.before == short.before == ARMS["start-aligned-first"]
    assert long.before.start == ARMS["start-aligned"].start == ARMS["start-only"].start
    assert long.share == short.share == 1 - long.before.share
    tokens = [
        arm.options(BUDGETS["screen"]).get("data.batch_rows", 32) * dump(arm.cache).length for arm in (long, short)
    ]
    assert tokens == [16_384, 16_384]
    same = replace(long, name=short.name, about=short.about, cache=short.cache, overrides={})
    assert same == short
    assert long.dumps() == ("experiment-long", "experiment") and short.dumps() == ("experiment", "experiment-long")
    assert list(needs([long], BUDGETS["screen"], Path("scratch"))) == [
        "experiment", "experiment-long", "experiment-other",
    ]  # fmt: skip


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
        ("# a\nquestion: signal\nstart: {arm: none}\n", "start.arm 'none' is no file of"),
        ("# a\nquestion: signal\nstart: {arm: [base]}\n", r"start.arm \['base'\] is no file of"),
        ("# a\nquestion: signal\nstart: {arm: base, align_tokens: 1}\n", "stands alone, found align_tokens too"),
        ("# a\nquestion: signal\nstart: {arm: arm}\n", "begins from this arm itself: arm, then arm"),
        (
            "# a\nquestion: signal\nstart: {arm: back}\n",
            "start.arm arm begins from this arm itself: arm, then back, then",
        ),
        (
            "# a\nquestion: signal\nstart: {arm: base}\noverrides: {model.student.blocks: 2}\n",
            "start.arm base trains another student: model.student.blocks is 2, there 6",
        ),
        ("# a\nquestion: signal\nshare: 1.5\n", "share is 1.5, must be a number from 0 to 1"),
        ("# a\nquestion: signal\nshare: true\n", "share is True, must be a number"),
        ("# a\nquestion: signal\nshare: .nan\n", "share is nan, must be a number"),
        ("# a\nquestion: signal\nshare: 0\n", "share is 0, which trains nothing"),
        ("# a\nquestion: signal\nlong: 2048\n", "long is 2048, not of the type bool"),
        ("# a\nquestion: signal\nphase: true\n", "question is 'signal', but a phase is neither run nor judged"),
        ("# a\nphase: true\nlong: true\n", "long is True, but a phase"),
        ("# a\nphase: 1\n", "phase is 1, not of the type bool"),
        ("# a\nquestion: signal\nbefore: base\n", "before is no field of an arm"),
        ("# a\n- question\n", "must hold fields"),
        ("# a\nquestion: [signal\n", "is no YAML"),
    ],
)
def test_a_wrong_manifest_is_told(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "arm.yaml").write_text(text)
    (tmp_path / "base.yaml").write_text("# a\nphase: true\n")
    (tmp_path / "back.yaml").write_text("# a\nphase: true\nstart: {arm: arm}\n")
    with pytest.raises(UserError, match=told):
        load_arm(tmp_path / "arm.yaml")


def test_a_question_needs_its_reference(tmp_path: Path) -> None:
    (tmp_path / "tail-k16.yaml").write_text((EXPERIMENTS / "tail-k16.yaml").read_text())
    with pytest.raises(UserError, match="mix-0.9.yaml is missing"):
        load_arms(tmp_path)
    (tmp_path / "mix-0.9.yaml").write_text("# a\nphase: true\n")
    with pytest.raises(UserError, match="mix-0.9.yaml: phase is true, but it is the reference of question k"):
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
        replace(arm, share=0.5).settings(budget),
        replace(arm, long=True).settings(budget),
        replace(arm, start={"arm": "mix-0.9"}, before=ARMS["mix-0.9"]).settings(budget),
        replace(arm, start={"arm": "mix-0.9"}, before=replace(ARMS["mix-0.9"], share=0.5)).settings(budget),
    ]
    original = module._read
    monkeypatch.setattr(module, "_read", lambda path: {**original(path), "added": 1})
    others.append(arm.settings(budget))
    assert len({before, *others}) == 1 + len(others)


def test_rows_made_before_there_were_phases_are_not_out_of_date() -> None:
    arm = Arm("a", "about", ("signal",), overrides={"data.k": 4}, start={"align_tokens": 1000})
    assert json_of_settings(arm) == [{"align_tokens": 1000}, False]
    assert json_of_settings(replace(arm, share=0.5)) == [{"align_tokens": 1000}, False, {"share": 0.5}]


def json_of_settings(arm: Arm) -> list[object]:
    """What of a row's identity comes after the revision and the budget's part."""
    seen: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.json, "dumps", lambda what, **_: seen.append(what) or "")
        arm.settings(BUDGETS["screen"])
    return seen[0][6:]  # type: ignore[index,no-any-return]


def test_choosing() -> None:
    screen, headline = BUDGETS["screen"], BUDGETS["headline"]
    assert [arm.name for arm in chosen(ARMS, ["tail-k8", "ce"], None, screen)] == ["tail-k8", "ce"]
    of_k = [arm.name for arm in chosen(ARMS, None, "k", screen)]
    assert of_k[0] == "mix-0.9" and set(of_k) == {"mix-0.9", *(f"tail-k{k}" for k in (8, 16, 32, 64))}
    assert {arm.budget for arm in chosen(ARMS, None, None, headline)} == {"headline", "both"}
    long_only = {name for name, arm in ARMS.items() if arm.budget == "headline"}
    phases = {name for name, arm in ARMS.items() if arm.phase}
    assert phases and {arm.name for arm in chosen(ARMS, None, None, screen)} == ARMS.keys() - phases - long_only
    assert {arm.name for arm in chosen(ARMS, None, None, BUDGETS["small"])} == ARMS.keys() - phases
    assert phases.isdisjoint(arm.name for arm in chosen(ARMS, None, "start", screen))
    with pytest.raises(UserError, match="--arms start-aligned-first: a phase is trained when"):
        chosen(ARMS, ["ce", "start-aligned-first"], None, screen)
    with pytest.raises(UserError, match="--arms ec: no such file"):
        chosen(ARMS, ["ec"], None, screen)
    with pytest.raises(UserError, match="--question what: known are recommended"):
        chosen(ARMS, None, "what", screen)
