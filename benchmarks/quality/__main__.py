"""`python -m benchmarks.quality`: train and evaluate the arms of manifests/experiments that have no figures yet.

    python -m benchmarks.quality --minutes 8 --out OUT        # as many screening arms as fit, side by side on one GPU
    python -m benchmarks.quality --question k --seeds 0 1 2
    python -m benchmarks.quality --report                     # docs/results.md out of benchmarks/results/quality.json

What is missing is dumped first (by `python -m teacher_dump`, from the embedded teacher and texts), while one process
compiles what training needs; then worker processes take arm after arm. Each figure is written when it is there, so that
whatever ends the run costs the arms at hand and no more. The same command again goes on with those that are missing.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measured import Row, device_name, table
from benchmarks.quality import STARTED
from benchmarks.quality.arms import (
    BUDGETS,
    HELDOUT_CACHE,
    OTHER_CACHE,
    QUESTIONS,
    Arm,
    Budget,
    chosen,
    is_current,
    load_arms,
)
from benchmarks.quality.caches import Dumps, needs
from benchmarks.quality.judges import DATA, JUDGES
from benchmarks.quality.pool import Answer, Clock, Pool, known_seconds
from benchmarks.quality.results import QUALITY, RowFile, curves_of, key_of
from benchmarks.quality.tables import cost_table, long_table, question_table, teacher_row, verdicts
from benchmarks.quality.trial import Trial
from pipeline.errors import UserError, run_command
from student.evaluation.zero_shot_tasks import prepare

GPU_WORKERS = 3
"""Students of the teacher's shape take some 22 of 80 GB each."""
LOG_BYTES = 20_000


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--arms", nargs="+", metavar="NAME", help="files of manifests/experiments; all unless given")
    options.add_argument("--question", help=f"the arms of one table: {', '.join(QUESTIONS)}")
    options.add_argument("--budget", choices=("screen", "headline"), default="screen", help="4.2 M tokens, or 60 M")
    options.add_argument("--seeds", nargs="+", type=int, help="0, and of headline 0 1 2, unless given")
    options.add_argument("--minutes", type=float, help="begin no arm that would end later, dumps included")
    options.add_argument("--workers", type=int, help=f"processes at once; {GPU_WORKERS} a GPU, 1 on a CPU unless given")
    options.add_argument(
        "--scratch", type=Path, default=Path("runs/quality"), help="folder for caches, runs and logs (some 15 GB)"
    )
    options.add_argument("--results", type=Path, default=QUALITY, help="the file that figures are added to")
    options.add_argument("--out", type=Path, help="folder that gets a copy of every result as it comes")
    options.add_argument("--keep_runs", action="store_true", help="leave the students' run folders in SCRATCH")
    options.add_argument("--judges", nargs="+", choices=JUDGES, default=[], help="ask these about every student too")
    options.add_argument("--judged_seeds", nargs="+", type=int, help="of which seeds; all unless given")
    options.add_argument("--graphs", action="store_true", help="launch blocks as CUDA graphs; changes times only")
    options.add_argument("--small", action="store_true", help="2 shards of 512 tokens: checks the runner, on a CPU too")
    options.add_argument("--list", action="store_true", help="say what is missing, and end")
    options.add_argument("--merge", nargs="+", type=Path, metavar="FILE", help="add the rows of such files, and end")
    options.add_argument("--report", action="store_true", help="write docs/results.md out of --results, and end")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0 also where time was up or arms failed, which is told."""
    given = parser().parse_args(arguments)
    results = given.results
    if given.report:
        from benchmarks.quality.report import write_report

        rows = with_questions(RowFile(results).read(), load_arms())
        print(f"written: {write_report(rows, RowFile(curves_of(results)).read())}")
        return 0
    if given.merge:
        for path in given.merge:
            RowFile(results).add(RowFile(path).read())
            RowFile(curves_of(results)).add(RowFile(curves_of(path)).read())
        return 0
    budget = BUDGETS["small" if given.small else given.budget]
    if given.small and results == QUALITY:
        results = given.scratch / QUALITY.name
    arms = chosen(load_arms(), given.arms, given.question, budget)
    seeds = given.seeds or list(budget.seeds)
    if unasked := sorted(set(given.judged_seeds or []) - set(seeds)):
        raise UserError(
            f"--judged_seeds {unasked[0]}: not among the seeds {', '.join(map(str, seeds))}; add it to --seeds"
        )
    judges = {seed: tuple(given.judges) for seed in given.judged_seeds or seeds}
    how = {"keep": given.keep_runs, "graphs": given.graphs}
    missing = trials_of(arms, seeds, budget, RowFile(results).read(), given.scratch, judges, **how)
    print(f"{len(arms) * len(seeds)} trials of {budget.name}, {len(missing)} without figures", flush=True)
    if given.list:
        print("\n".join(map(str, missing)))
        return 0
    if missing:
        run(missing, results, given)
    show(with_questions(RowFile(results).read(), load_arms()), budget.name)
    return 0


def trials_of(
    arms: list[Arm],
    seeds: list[int],
    budget: Budget,
    rows: list[Row],
    scratch: Path,
    judges: Mapping[int, tuple[str, ...]] | None = None,
    **how: Any,
) -> list[Trial]:
    """Those that have no figures, figures of other settings than the manifests' now, or none of a judge that is asked;
    the first seeds first.

    Args:
        judges: by seed, those that are asked.
        how: further fields of `Trial`.
    """
    asked, judges = {arm.name: arm for arm in arms}, judges or {}
    own = [row for row in rows if row["budget"] == budget.name and "error" not in row]
    done = {
        key_of(row)
        for row in own
        if is_current(row, asked.get(row["arm"]), budget)
        and all(judge in row or judge in row.get("unjudged", {}) for judge in judges.get(row["seed"], ()))
    }
    caches = scratch / "caches" / budget.name
    trials = [
        Trial(
            arm,
            seed,
            budget,
            caches / arm.cache,
            caches / HELDOUT_CACHE,
            caches / OTHER_CACHE,
            scratch / "runs" / f"{budget.name}-{arm.name}-{seed}",
            judges=judges.get(seed, ()),
            **how,
        )  # fmt: skip
        for seed in seeds
        for arm in arms
    ]
    return [trial for trial in trials if trial.key not in done]


def with_questions(rows: list[Row], arms: Mapping[str, Arm]) -> list[Row]:
    """Rows with the questions that their arms' manifests ask now; they may have been measured under others."""
    return [{**row, "question": list(arms[row["arm"]].question)} if row["arm"] in arms else row for row in rows]


def run(trials: list[Trial], results: Path, given: argparse.Namespace) -> None:
    """Dump, train and evaluate what is missing; every answer is written when it comes."""
    on_gpu = torch.cuda.is_available()
    workers = given.workers or (GPU_WORKERS * torch.cuda.device_count() if on_gpu else 1)
    if workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1")
    if "zero_shot" in given.judges:
        prepare(DATA)  # fetches them where they are missing, before anything is trained
    budget = trials[0].budget
    known = known_seconds(RowFile(results).read(), load_arms(), budget.name, device_name())
    clock = Clock(given.minutes, known, STARTED)
    logs = given.scratch / "logs"
    report = partial(write_answer, results=results, out=given.out, workers=workers, logs=logs)
    wanted = needs({trial.arm.name: trial.arm for trial in trials}.values(), budget, given.scratch)
    with Dumps(wanted, logs) as dumps:
        pool = Pool(trials, dumps, clock, workers, given.scratch, report, warm=on_gpu and not given.small)
        left = pool.run()
    if left:
        print(f"left: {'; '.join(map(str, left))}. Run the same command again to go on", flush=True)


def write_answer(trial: Trial, answer: Answer, *, results: Path, out: Path | None, workers: int, logs: Path) -> None:
    """Add what became of a trial to the results; copy them to `out`, and the ends of what dumps and workers said."""
    name, seed, budget = trial.key
    if "error" in answer:
        print(f"{trial} failed: {answer['error']}", file=sys.stderr, flush=True)
        failed = {"arm": name, "seed": seed, "budget": budget, "error": answer["error"]}
        RowFile(results).add([{**failed, "date": datetime.now(UTC).date().isoformat()}])
    else:
        row = {**answer["row"], "workers": workers, "gpus": max(1, torch.cuda.device_count()), "graphs": trial.graphs}
        RowFile(results).add([answer["teacher"], row])
        RowFile(curves_of(results)).add([answer["curve"]] if "curve" in answer else [])
        took = "  ".join(f"{phase} {seconds:.1f}" for phase, seconds in row["seconds"].items())
        heldout = row["heldout"]
        print(
            f"{trial}: KL {heldout['kl_full']:.4f}  CE {heldout['ce']:.4f}  "
            f"{row['tokens_per_s']:,.0f} tokens/s  {row['peak_gb']:.1f} GB  seconds: {took}",
            flush=True,
        )
        for judge, reason in row.get("unjudged", {}).items():
            print(f"{trial}: {judge} found nothing: {reason}", file=sys.stderr, flush=True)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        pictures = sorted((logs.parent / "pictures").glob("*.png"))
        for path in (results, curves_of(results), *pictures):
            if path.is_file():
                shutil.copyfile(path, out / path.name)
        ends = [f"== {path.name}\n{end_of(path)}" for path in sorted(logs.glob("*.log"))]
        (out / "quality_logs.txt").write_text("\n".join(ends), encoding="utf-8")


def end_of(path: Path) -> str:
    """The last `LOG_BYTES` of a file."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - LOG_BYTES))
        return file.read().decode(errors="replace")


def show(rows: list[Row], budget: str) -> None:
    """The tables on the screen."""
    teacher = teacher_row(rows, budget)
    if teacher is not None:
        told = "; ".join(f"{text} CE {teacher[text]['ce']:.4f}, {teacher[text]['perplexity']:.2f} perplexity"
                         for text in ("heldout", "other"))  # fmt: skip
        print(f"\nteacher: {told}")
    for name, question in QUESTIONS.items():
        lines = question_table(rows, budget, name)
        if lines:
            print(f"\n{question.title} ({name}, {budget})\n{table(lines)}")
            if said := verdicts(rows, budget, name):
                print(said)
    longer = long_table(rows, budget)
    if longer:
        print(f"\nheld-out text in longer rows\n{table(longer)}")
    costs = cost_table(rows, budget)
    if costs:
        print(f"\nseconds of each phase\n{table(costs)}")


if __name__ == "__main__":
    sys.exit(run_command(main))
