"""What must hold of a cache after harm: what is visible is whole, and the same command brings it to the same rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from chaos.children import TIMEOUT_SECONDS, Child, ChildFailed
from chaos.recorded import Stage, differences, rows_of, run_recorded
from pipeline.cache import Cache
from pipeline.commit import file_sha256, read_json
from pipeline.errors import UserError
from pipeline.shard import read_back
from pipeline.teacher_folder import TeacherFolder
from pipeline.verify import verify_cache

EXAMPLES = 4


@dataclass
class Outcome:
    """What one trial came to; empty lists are as they should be."""

    corrupt: list[str] = field(default_factory=list)  # visible after the harm, and not whole
    different: list[str] = field(default_factory=list)  # from the undisturbed cache, after the next run
    left: list[str] = field(default_factory=list)  # temporaries, claims and strays after the next run
    broken: list[str] = field(default_factory=list)  # other promises, such as those about messages
    tokens: int = 0  # captured beyond what the cache needs
    shards: int = 0  # committed when the harm came

    @property
    def ok(self) -> bool:
        return not (self.corrupt or self.different or self.left or self.broken)

    def said(self) -> list[str]:
        return [*self.corrupt, *self.different, *self.left, *self.broken]


def wrong_in(stage: Stage, cache: Path) -> list[str]:
    """What a reader can see of `cache` and is not whole and right. Reads files: for a child."""
    if not cache.is_dir():
        return []
    wrong = []
    if (cache / "manifest.json").is_file():
        result = verify_cache(cache)
        missing = {f"{name}.json" for name in result.missing}  # not committed yet is not wrong
        wrong += [str(problem) for problem in result.problems if problem.file not in missing]
        if not wrong:
            wrong += differences(stage.rows, rows_of(cache), whole=False)
    elif shards := [path.name for path in cache.glob("*.json") if path.name != "plan.json"]:
        wrong.append(f"{', '.join(shards)} visible without a manifest")
    for path in sorted(cache.rglob("*")):
        if path.name.endswith(".tmp") or not path.is_file():
            continue
        try:
            if path.parent.name == "teacher":
                twin = stage.config.cache / "teacher" / path.name
                if file_sha256(path) != file_sha256(twin):
                    wrong.append(f"teacher/{path.name} is not what the undisturbed cache has")
            elif path.suffix == ".parquet":
                read_back(path, Cache(stage.config.cache).spec)
            elif path.parent == cache:
                read_json(path)
        except (UserError, OSError, ValueError) as error:
            wrong.append(f"{path.name} under its final name: {error}")
    if (cache / "teacher" / "teacher.json").is_file():
        try:
            TeacherFolder(cache / "teacher").tensors()
        except UserError as error:
            wrong.append(str(error))
    return wrong


def leftovers(cache: Path) -> list[str]:
    """What no finished dump leaves: temporaries, claims, files that belong to no shard."""
    left = [f"{path.relative_to(cache)} is left" for path in sorted(cache.rglob(".*"))]
    left += [f"claim {path.name} is left" for path in sorted((cache / "claims").glob("*"))]
    result = verify_cache(cache)
    return left + [str(note) for note in result.notes if str(note) not in left] + list(map(str, result.problems))


def committed_shards(cache: Path) -> int:
    return len([*cache.glob("shard-*.json"), *cache.glob("heldout-*.json")])


def recovered(
    stage: Stage,
    cache: Path,
    log: Path | None,
    again: Callable[[], Any] | None = None,
    timeout: float = TIMEOUT_SECONDS,
) -> Outcome:
    """Look at what is visible, run the same command to its end, and compare; in a child of its own.

    Args:
        log: where the replay notes rows; tokens beyond what the cache needs are counted from it.
        again: runs the command; None takes the replayed dump.
    """

    def body() -> Outcome:
        outcome = Outcome(wrong_in(stage, cache), shards=committed_shards(cache))
        if again is None:
            run_recorded(stage, cache, log)
        else:
            again()
        outcome.different = differences(stage.rows, rows_of(cache))
        outcome.left = leftovers(cache)
        if log is not None:
            outcome.tokens = captured(log) - stage.tokens
        return outcome

    try:
        found = Child(body, cache.parent / f"{cache.name}.txt").result(timeout)
    except ChildFailed as error:
        return Outcome(broken=[f"the next run: {str(error).strip().splitlines()[-1]}"])
    assert isinstance(found, Outcome)
    return found


def as_it_stands(stage: Stage, cache: Path, log: Path) -> Outcome:
    """The cache without a further run; reads files: for a child."""
    outcome = Outcome(wrong_in(stage, cache), differences(stage.rows, rows_of(cache)), leftovers(cache))
    outcome.tokens = captured(log) - stage.tokens
    return outcome


def captured(log: Path) -> int:
    """Tokens the teacher read, of all runs that noted them in `log`."""
    return sum(int(line.split()[1]) for line in log.read_text().splitlines()) if log.is_file() else 0


def facts(stage: Stage, outcomes: list[Outcome], names: list[str]) -> dict[str, Any]:
    """What is worth telling of many trials; `names` says what each was."""
    shard = stage.tokens / stage.shards
    redone = [max(0, outcome.tokens) / shard for outcome in outcomes] or [0.0]
    found: dict[str, Any] = {
        "corrupt visible shards": sum(bool(outcome.corrupt) for outcome in outcomes),
        "caches not identical": sum(bool(outcome.different) for outcome in outcomes),
        "temporaries or claims left": sum(bool(outcome.left) for outcome in outcomes),
        "work redone, shards": f"mean {mean(redone):.2f}, worst {max(redone):.2f} (of {stage.shards})",
    }
    examples = [f"{name}: {outcome.said()[0]}" for name, outcome in zip(names, outcomes, strict=True) if not outcome.ok]
    if examples:
        found["examples"] = examples[:EXAMPLES]
    return found
