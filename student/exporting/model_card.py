"""The README of an exported student: what it is, how to use it, what was measured, and under which licences.

`CardSource` gathers what run and caches say, `model_card` writes it down. Every value may come from someone else's run,
so it is shown as plain text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from pipeline.cache import Cache
from pipeline.card import corpus_source, shown
from pipeline.commit import read_json, read_text
from pipeline.errors import UserError
from pipeline.licences import Licence, licence_of, licence_of_all
from pipeline.markdown import code, front_matter, plain, table
from pipeline.schema import HELDOUT_UNIT
from pipeline.teacher_folder import TeacherFacts, TeacherFolder
from student.exporting.huggingface.configuration_distil_xlstm import DistilXLSTMConfig
from student.exporting.measured import Measured, read_figures, section
from student.runs.checkpoint import RunRecord, checkpoint_path
from student.runs.identity import Teaching, require_same_teacher
from student.runs.run_folder import ORIGIN

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on a hub
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer(["The history of science is", "The"], padding=True, return_tensors="pt")
texts = model.generate(**inputs, max_new_tokens=20, do_sample=False)
print(tokenizer.batch_decode(texts, skip_special_tokens=True))
```
"""


@dataclass(frozen=True)
class CardFacts:
    """What the card tells.

    Attributes:
        name: of the run.
        config: of the exported model.
        teacher: its facts.
        dtype: of the stored weights.
        trained, all: numbers of parameters.
        unfrozen: which of embedding and head were trained.
        checkpoint: what was exported.
        steps: optimiser steps behind it; None where the checkpoint does not say.
        corpora: sources of the caches that are here; empty where none is.
        caches: `data` of the caches the run was started on, and the number of training rows of each.
        loss: the loss's settings; None where the run does not say.
        origin: the teacher's layers whose weights the blocks began with, and on how many tokens they were taught
            those layers' attention; None where they began with none.
        measured: evaluations and zero-shot tasks of this checkpoint.
        teacher_licence, corpus_licence: as far as known.
    """

    name: str
    config: DistilXLSTMConfig
    teacher: TeacherFacts
    dtype: str
    trained: int
    all: int
    unfrozen: tuple[str, ...]
    checkpoint: str
    steps: int | None
    corpora: list[str]
    caches: list[tuple[dict[str, Any], int]]
    loss: dict[str, Any] | None
    origin: tuple[list[int], int] | None
    measured: Measured
    teacher_licence: Licence
    corpus_licence: Licence


class CardSource:
    """A run, and the caches it learnt from where they are here.

    Args:
        run, checkpoint: what is exported.
        cache: a cache by path or URL; None: those that the run names.
        teacher_licence, corpus_licence: what the user says.

    Raises:
        UserError: `cache` is none, or of another teacher.
    """

    def __init__(
        self,
        run: Path,
        checkpoint: str,
        cache: str | None = None,
        teacher_licence: str | None = None,
        corpus_licence: str | None = None,
    ) -> None:
        self.run, self.checkpoint = run, checkpoint
        self.teacher_licence, self.corpus_licence = teacher_licence, corpus_licence
        self.started_on = _started_on(run)
        teaching = RunRecord.read(run).teaching(run)
        self.caches: list[Cache] = []
        # A stranger's run must not choose what is fetched.
        named = [path for path, _, _ in self.started_on if "://" not in path] if cache is None else [cache]
        for path in named:
            try:
                found = Cache(path)
                require_same_teacher(Teaching.of(found), teaching, "Name a cache of the run's teacher")
            except UserError:
                if cache is not None:
                    raise
            else:
                self.caches.append(found)

    def facts(
        self, teacher: TeacherFolder, config: DistilXLSTMConfig, dtype: str, trained: int, parameters: int,
        unfrozen: tuple[str, ...],
    ) -> CardFacts:  # fmt: skip
        """Everything the card tells.

        Raises:
            UserError: a file of figures is damaged, or an option names no licence.
        """
        sources = list(dict.fromkeys(corpus_source(cache.manifest) for cache in self.caches))
        folders = [teacher.path, *(Path(cache.manifest.teacher_path) for cache in self.caches)]
        return CardFacts(
            name=self.run.resolve().name,
            config=config,
            teacher=teacher.facts,
            dtype=dtype,
            trained=trained,
            all=parameters,
            unfrozen=unfrozen,
            checkpoint=Path(self.checkpoint).name,
            steps=_steps(checkpoint_path(self.run, self.checkpoint)),
            corpora=[shown(source) for source in sources],
            caches=[(data, rows) for _, data, rows in self.started_on],
            loss=_loss(self.run),
            origin=_origin(self.run, config.num_hidden_layers),
            measured=read_figures(self.run, self.checkpoint),
            teacher_licence=licence_of(teacher.facts.name, folders, self.teacher_licence),
            corpus_licence=licence_of_all(sources, self.corpus_licence),
        )


def _started_on(run: Path) -> list[tuple[str, dict[str, Any], int]]:
    """Path, what decides the rows, and training rows of the caches in data.json; empty where it does not say."""
    try:
        found = []
        for entry in read_json(run / "data.json")["caches"]:
            rows = sum((last - first + 1) * rows for first, last, rows in entry["units"] if first < HELDOUT_UNIT)
            found.append((str(entry["path"]), dict(entry["data"]), int(rows)))
        return found
    except (UserError, KeyError, TypeError, ValueError):
        return []


def _loss(run: Path) -> dict[str, Any] | None:
    """The loss's settings in config.yaml."""
    try:
        loss = yaml.safe_load(read_text(run / "config.yaml"))["model"]["loss"]
        return {str(name): value for name, value in loss.items() if isinstance(value, str | int | float | bool)}
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return None


def _origin(run: Path, blocks: int) -> tuple[list[int], int] | None:
    """See `CardFacts.origin`."""
    try:
        record = read_json(run / ORIGIN)
        layers, tokens = record["layers"], record["align_tokens"]
    except (UserError, KeyError, TypeError):
        return None
    known = isinstance(layers, list) and len(layers) == blocks and all(type(n) is int for n in [*layers, tokens])
    return (layers, tokens) if known else None


def _steps(checkpoint: Path) -> int | None:
    """Optimiser steps behind a checkpoint that was loaded before; None where it does not say."""
    steps = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True).get("global_step")
    return steps if type(steps) is int else None


def model_card(facts: CardFacts) -> str:
    """The card in Markdown."""
    parts = [
        front_matter(_front(facts)),
        f"# {plain(facts.name)}: an xLSTM student of {plain(shown(facts.teacher.name))}\n",
        _opening(facts),
        "## Use\n",
        "The folder brings its own model code, which needs torch and transformers (tried with 5.17 and 5.19).\n",
        USE,
        _use_notes(facts),
        "## Measured\n",
        section(facts.measured, facts.corpora),
        "## What it learnt from\n",
        _learnt(facts),
        "## Licences\n",
        _licences(facts),
    ]
    return "\n".join(parts)


def _front(facts: CardFacts) -> dict[str, Any]:
    front: dict[str, Any] = {
        "license": facts.teacher_licence.field,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["xlstm", "distil-xlstm", "knowledge-distillation", "custom_code"],
    }
    if HUB_ID.fullmatch(facts.teacher.name):
        front["base_model"] = facts.teacher.name
        front["base_model_relation"] = "finetune"
    if hub := [source.removeprefix("hub:") for source in facts.corpora if source.startswith("hub:")]:
        front["datasets"] = hub
    return front


def _opening(facts: CardFacts) -> str:
    config = facts.config
    same = len(set(config.block_types)) == 1
    kinds = f"all {config.block_types[0]}" if same else ", ".join(config.block_types)
    changed = {0: "unchanged", 1: f"of which the {''.join(facts.unfrozen)} was trained further"}
    return (
        f"A recurrent language model: the embedding and the head of {plain(shown(facts.teacher.name))}, "
        f"{changed.get(len(facts.unfrozen), 'trained further')}, "
        f"around {config.num_hidden_layers} xLSTM blocks ({kinds}) that were trained to predict what the teacher does "
        "([Distil-xLSTM](https://arxiv.org/abs/2503.18565), [xLSTM](https://arxiv.org/abs/2405.04517)).\n\n"
        f"Width {config.hidden_size}, {config.num_heads} heads, {config.vocab_size:,} ids; {facts.trained:,} trained "
        f"parameters of {facts.all:,}, stored as {facts.dtype}. What it remembers of a text takes as much memory after "
        "ten tokens as after a million.\n"
    )


def _use_notes(facts: CardFacts) -> str:
    length = facts.config.trained_length
    trained = (
        f"It was trained on rows of {length:,} tokens; longer texts are read, and were not measured.\n"
        if length
        else ""
    )
    return (
        "Padding may be on either side or anywhere else: what the attention mask leaves out is as if it were not "
        "there. For `generate` it must be on the left, as the tokenizer here puts it. Beam search, `labels=` and "
        "fine-tuning work as usual; assisted generation does not, since a recurrent state cannot be taken back.\n"
        + trained
    )


def _learnt(facts: CardFacts) -> str:
    lines = [f"- Teacher: {plain(shown(facts.teacher.name))}, sha256 {code(facts.teacher.teacher_sha256[:16])}."]
    lines.append(f"- Corpus: {', '.join(map(code, facts.corpora)) or 'not known here'}.")
    if facts.origin is not None:
        layers, tokens = facts.origin
        taught = f"; then each was taught its layer's attention on {tokens:,} tokens" if tokens else ""
        lines.append(
            f"- Blocks began with the weights of the teacher's layers {', '.join(map(str, layers))} (the first is 0)"
            f"{taught}. Embedding and head {'began as' if facts.unfrozen else 'are'} the teacher's in any case."
        )
    for data, rows in facts.caches:
        shape = ", ".join(f"{name} {plain(data[name])}" for name in ("length", "k", "packing") if name in data)
        lines.append(f"- A cache of the teacher's outputs of {rows:,} training rows ({shape}).")
    steps = "" if facts.steps is None else f", {facts.steps:,} optimiser steps"
    lines.append(f"- Checkpoint {code(facts.checkpoint)}{steps}.")
    if facts.loss:
        lines.append("- Loss: " + ", ".join(f"{plain(k)} {plain(v)}" for k, v in facts.loss.items()) + ".")
    return "\n".join(lines) + "\n"


def _derived_from(facts: CardFacts) -> str:
    outputs_only = facts.origin is None and not facts.unfrozen
    return "the teacher's outputs" if outputs_only else "the teacher's weights, and from its outputs"


def _licences(facts: CardFacts) -> str:
    kept = [part for part in ("embedding", "head") if part not in facts.unfrozen]
    rows = [
        [
            f"{', '.join(kept)} and tokenizer" if kept else "tokenizer",
            f"the teacher's: {plain(facts.teacher_licence)}",
            plain(facts.teacher_licence.source),
        ],
        ["trained parameters", f"derived from {_derived_from(facts)} on the corpus: both licences", ""],
        ["corpus", plain(facts.corpus_licence), plain(facts.corpus_licence.source)],
        ["model code (`*.py`)", "apache-2.0", "`LICENSE`"],
    ]
    return (
        table(["part", "licence", "known from"], rows)
        + "\nThe blocks compute what those of the `xlstm` package (Apache-2.0) do, with which the student was trained. "
        "The code here is separate: it uses neither that package nor `mlstm_kernels` (NXAI Community License).\n"
    )
