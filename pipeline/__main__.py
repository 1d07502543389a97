"""`python -m pipeline COMMAND`: plan a dump, look at a cache and a run."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from pipeline.config import parse_into
from pipeline.errors import UserError, run_command

COMMANDS = {
    "inspect": ("pipeline.inspection", "what a shard holds: columns, sizes, and positions decoded to text"),
    "verify": ("pipeline.verify", "check every byte and every number of a cache"),
    "estimate": ("pipeline.estimate", "what a dump and a training would take: bytes, files, GPU hours, cost"),
    "card": ("pipeline.card", "the README of a cache: what is in it, from where, how to load it"),
    "index": ("pipeline.indexing", "gather the records of many shards in one file, so that the cache opens fast"),
    "report": ("pipeline.report", "one HTML page with the pictures and figures of a cache and a run"),
    "summary": ("pipeline.summary", "the few closing lines: what was dumped, trained and measured"),
}
"""Command -> (module with `Options`, `DESCRIPTION` and `run`, one line for the list of commands)."""


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {line}" for name, (_, line) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: python -m pipeline COMMAND [options]",
            "",
            "Look at a cache of teacher outputs and at the run of a student that learnt from it.",
            "",
            "commands:",
            *lines,
            "",
            "python -m pipeline COMMAND --help shows a command's options.",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Dispatch on the first word; the command's module is imported only now, so that each starts fast.

    Raises:
        UserError: the first word is no command, or an option is wrong.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    name = words[0]
    if name not in COMMANDS:
        raise UserError(f"{name}: there is no such command; known are {', '.join(COMMANDS)}")
    module: Any = import_module(COMMANDS[name][0])
    options = parse_into(module.Options, f"python -m pipeline {name}", module.DESCRIPTION, "--config", words[1:])
    return int(module.run(options))


def guarded() -> int:
    """`main` for a terminal: characters it cannot show are replaced."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    return main()


if __name__ == "__main__":
    sys.exit(run_command(guarded))
