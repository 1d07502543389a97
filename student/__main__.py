"""`python -m student`: train a student from a cache.

    python -m student --config manifests/students/demo.yaml --cache caches/demo --run runs/demo

The same command again goes on with the run, or says that it is finished.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import set_parsing_settings
from lightning import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from pipeline.bfloat16 import slow_in_bfloat16
from pipeline.config import check_files_exist
from pipeline.errors import UserError, run_command
from student.data.loader import CacheDataModule
from student.runs.checkpoint import RunRecord
from student.runs.identity import Teaching, cache_record, require_same_teacher
from student.runs.run_folder import MetricsCSV, check_same_settings, copy_teacher, open_data, save_settings, steps_done
from student.training.callbacks import BEST, LAST, Interrupted, LogLines, RunCheckpoint, TrainBar
from student.training.initial import check_initial, keep_origin, load_initial
from student.training.module import METRICS, DistillModule
from student.training.ranks import OneRun, end_other_ranks, is_lost_rank, require_equal_shares, trainer_options
from student.training.sharding import strategy_of

TRAINER_DEFAULTS = {
    "accelerator": "auto",
    "devices": "auto",
    "max_epochs": 1,
    "log_every_n_steps": 10,
    "gradient_clip_val": 1.0,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}


class Parser(LightningArgumentParser):
    """Complaints become one sentence."""

    def error(self, message: str, ex: Exception | None = None) -> Any:  # type: ignore[override]
        sentence = " ".join(line.strip() for line in message.splitlines() if line.strip())
        raise UserError(f"{sentence} (see python -m student --help)")


class TrainCLI(LightningCLI):
    """Lightning's command line with a run folder."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--cache", type=str | list[str], default="", help="Cache folder, or a list of them.")
        parser.add_argument("--run", type=str, default="", help="Folder of this run; an existing one goes on.")
        parser.add_argument(
            "--checkpoint_every", type=int, default=200, help="Optimiser steps between two writes of last.ckpt."
        )
        parser.add_argument(
            "--init_from",
            type=str,
            default="",
            help="Run folder, or a checkpoint in one: a new run begins with its student's weights, at step 0 of a "
            "schedule of its own. How shards that a cache gained since, or another cache of the same teacher, are "
            "taken in.",
        )
        parser.add_argument(
            "--explosion",
            type=float,
            default=5.0,
            help="Stop where a batch's loss is more than so many times the mean of the last hundred steps, and a nat; "
            "0: only where it is not finite.",
        )
        parser.link_arguments("cache", "data.cache")
        parser.link_arguments("run", "trainer.default_root_dir")

    def before_instantiate_classes(self) -> None:
        for name, meaning in (("cache", "the folder of a cache"), ("run", "the folder this run is to have")):
            if not self.config[name]:
                raise UserError(f"--{name} is missing: name {meaning} (see python -m student --help)")
        if self.config.checkpoint_every < 1:
            raise UserError(f"--checkpoint_every is {self.config.checkpoint_every}: it must be 1 or more")
        if self.config.explosion < 0 or 0 < self.config.explosion < 1:
            raise UserError(f"--explosion is {self.config.explosion:g}: it must be 0, or 1 or more")
        self.run_folder = Path(self.config.run)
        text = self.parser.dump(self.config, skip_link_targets=True, skip_unset=False, format="yaml")
        self.resolved = yaml.safe_load(text)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """The trainer, its run folder prepared or checked and its place found."""
        run: Path = self.run_folder
        last = run / "checkpoints" / LAST
        self._open_run()
        self.resume_step = steps_done(last) if last.is_file() else 0
        given = self.config_init["trainer"]
        interactive = sys.stdout.isatty() and given.get("enable_progress_bar") is not False
        checkpoints = RunCheckpoint(run / "checkpoints", self.config.checkpoint_every)
        self.log_lines = LogLines()
        # What the bar shows must come from the device, and the host waits for it.
        every = 20 if torch.cuda.is_available() else 1
        display = TrainBar(refresh_rate=every, leave=True) if interactive else self.log_lines
        kwargs |= trainer_options(given.get("devices", "auto"), given.get("num_nodes") or 1, os.environ)
        kwargs["strategy"] = strategy_of(given.get("strategy", "auto"), given.get("precision"))
        kwargs["enable_progress_bar"] = interactive
        same = OneRun(run, self.resume_step, self.resolved)
        kwargs["callbacks"] = [*(given.get("callbacks") or []), same, checkpoints, display]
        if given.get("logger") in (None, True):
            kwargs["logger"] = [
                MetricsCSV(run / "metrics.csv", METRICS, self.resume_step),
                TensorBoardLogger(run, name="tensorboard", version=""),
            ]
        return super().instantiate_trainer(**kwargs)

    def _open_run(self) -> None:
        """Check an existing run's identity, settings and shards; prepare a new one's folder on the first rank."""
        run, data = self.run_folder, self.datamodule
        of_cache = Teaching.of(data.caches[0])
        if (run / "checkpoints" / LAST).is_file():
            of_run = RunRecord.read(run).teaching(run)
            require_same_teacher(of_cache, of_run, "Name another --run or another --cache")
            check_same_settings(run, self.resolved)
            open_data(run, data.caches)
            return
        if self.config.init_from:
            check_initial(self.config.init_from, self.model.student, of_cache)
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            # No step was saved: what a refused or early stopped start left is begun anew.
            shutil.rmtree(run / "teacher", ignore_errors=True)
            teacher = data.teacher
            copy_teacher(teacher.path, run)
            keep_origin(self.config.init_from, run)
            caches = [cache_record(cache) for cache in data.caches]
            save_settings(run, self.resolved, {"caches": caches, "steps_per_epoch": data.steps_per_epoch})
            # Written last: a folder with run.json has everything else.
            RunRecord(
                student=self.model.student,
                teacher="teacher",
                max_length=data.max_length,
                compat_id=data.compat_id,
                width=teacher.facts.width,
                vocab_size=teacher.facts.vocab_size,
                compat=data.compat,
            ).write(run)

    def train(self) -> int:
        """Run or go on; returns the exit status."""
        self.model.trainer, self.trainer.datamodule = self.trainer, self.datamodule  # type: ignore[attr-defined]
        require_equal_shares(self.datamodule.batch_rows, self.trainer.num_devices * self.trainer.num_nodes)
        self.model.watch.factor = self.config.explosion
        total = self.model.total_steps()
        self.log_lines.total_steps = total
        last = self.run_folder / "checkpoints" / LAST
        if self.resume_step >= total:
            say(f"{self.run_folder} is finished: {self.resume_step} steps; evaluate it, or name another --run")
            return 0
        if self.resume_step:
            say(f"going on with {self.run_folder} at step {self.resume_step} of {total}")
        else:
            say(f"training {self.run_folder}: {total} steps of {self.datamodule.batch_rows} rows")
            if self.trainer.precision.startswith("bf16") and slow_in_bfloat16():
                say(
                    f"note: trainer.precision is {self.trainer.precision}, and this CPU does not multiply bfloat16: "
                    "a new run with --trainer.precision 32-true takes half the time"
                )
            if self.config.init_from:
                self.model.configure_model()
                load_initial(self.config.init_from, self.model.model)
        try:
            place = str(last) if self.resume_step else None
            self.trainer.fit(self.model, self.datamodule, ckpt_path=place, weights_only=True)
        except Interrupted as interrupted:
            say(
                f"stopped at step {self.trainer.global_step} of {total}, saved in {last}: "
                "run the same command to go on",
                file=sys.stderr,
            )
            # Another status of a rank would have Lightning kill the first one before it has ended.
            return 128 + interrupted.signal_number if self.trainer.is_global_zero else 0
        except BaseException as error:
            end_other_ranks(self.trainer)
            if is_lost_rank(error):
                raise UserError(
                    f"rank {self.trainer.global_rank} lost another rank, whose own message says why: when that is "
                    "mended, run the same command again"
                ) from None
            if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from None  # Ctrl-C before the first step, which Lightning makes an exit of
            raise
        best = self.run_folder / "checkpoints" / BEST
        lowest = f", lowest held-out cross-entropy in {best}" if best.is_file() else ""
        say(f"finished {total} steps: {last}{lowest}")
        return 0


@rank_zero_only
def say(line: str, file: Any = None) -> None:
    print(line, file=file, flush=True)


def quiet() -> None:
    """Keep Lightning's hints off the terminal; its errors stay."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in ("lightning", "torch.optim.lr_scheduler", "torch.utils.tensorboard"):
        warnings.filterwarnings("ignore", module=rf"{module}\.?")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")


def main(
    arguments: list[str] | None = None,
    module: type[DistillModule] = DistillModule,
    callbacks: Sequence[Callback] = (),
) -> int:
    """The command. A program may call it as often as it likes in a process; each call is a run of its own.

    Args:
        arguments: the words after `python -m student`; None takes the process's.
        module: what is trained, for programs that train another way.
        callbacks: of the trainer, besides the command's own.
    """
    given = sys.argv[1:] if arguments is None else arguments
    quiet()
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    check_files_exist(given, "--config")
    cli = TrainCLI(
        module,
        CacheDataModule,
        args=arguments,
        run=False,
        save_config_callback=None,
        trainer_defaults={**TRAINER_DEFAULTS, **({"callbacks": list(callbacks)} if callbacks else {})},
        seed_everything_default=0,
        parser_class=Parser,
        parser_kwargs={"prog": "python -m student", "description": "Train a Distil-xLSTM student from a cache."},
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
    )
    return cli.train()


if __name__ == "__main__":
    sys.exit(run_command(main))
