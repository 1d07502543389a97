"""Whether the numbers of a row group can be what the data contract says: the arithmetic part of `verify`.

Legend: R rows, T tokens a row, V vocabulary, K top-k ids, S temperatures, G depth groups, n = T/b blocks,
W = T/w windows, M tail samples.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pipeline.schema import CacheSpec, sequence_id
from pipeline.shard import Columns, DamagedShard

CLOSE = 1e-3
"""Nats, and attention mass, by which two ways to the same number may differ."""


def check_indices(columns: Columns, spec: CacheSpec, place: object) -> None:
    """Lengths and ids that embeddings and kernels index by must lie in their ranges: outside, a GPU reads or writes
    wherever they lead. `verify` looks at everything else.

    Args:
        columns: of a row group; only those that are there are looked at.
        place: shard and row group, for messages.

    Raises:
        DamagedShard: names the column.
    """
    V = spec.vocab_size
    ranges = {"length": (1, spec.length), "next_id": (-1, V - 1)}
    ranges |= dict.fromkeys(("input_ids", "topk_ids", "tail_ids"), (0, V - 1))
    for name, (least, most) in ranges.items():
        values = columns.get(name)
        if values is None or not values.size:
            continue
        if values.dtype == np.int32 and least == 0:
            values = values.view(np.uint32)  # one pass: negative ids become large ones
        found = int(values.max())
        low = least if values.dtype.kind == "u" else int(values.min())
        if found > most or low < least:
            raise DamagedShard(
                f"{place}, column {name}: holds {int(columns[name].min())} to {int(columns[name].max())}, not {least} "
                f"to {most}: run `make verify`, then dump the shard again"
            )


@dataclass(frozen=True)
class Finding:
    """Something wrong with one column of a row group."""

    column: str
    message: str


@dataclass
class Totals:
    """Sums over the rows that were checked; `add_group` adds one row group's."""

    rows: int = 0
    tokens: int = 0
    entropy: float = 0.0
    tail_mass: float = 0.0
    sink_rows: int = 0  # attention map rows that sum to less than one
    least_row_sum: float = 1.0
    findings: list[Finding] = field(default_factory=list)

    def add(self, other: Totals) -> None:
        self.rows += other.rows
        self.tokens += other.tokens
        self.entropy += other.entropy
        self.tail_mass += other.tail_mass
        self.sink_rows += other.sink_rows
        self.least_row_sum = min(self.least_row_sum, other.least_row_sum)
        self.findings += other.findings


class GroupCheck:
    """Checks of one row group; `totals.findings` holds one entry for each column and rule that is broken."""

    def __init__(self, columns: Columns, spec: CacheSpec, unit: int, first_row: int) -> None:
        self.columns, self.spec, self.unit, self.first_row = columns, spec, unit, first_row
        self.length_R = columns["length"].astype(np.int64)
        self.totals = Totals(rows=len(self.length_R), tokens=int(self.length_R.sum()))
        self.valid_RT = np.arange(spec.length)[None, :] < self.length_R[:, None]

    def flag(self, column: str, bad: np.ndarray, message: str) -> None:
        """Record a finding where `bad` (R, ...) is true anywhere."""
        count = int(np.count_nonzero(bad))
        if count:
            place = np.argwhere(bad)[0].tolist()
            where = f"row {self.first_row + place[0]}" + (f", index {place[1:]}" if len(place) > 1 else "")
            self.totals.findings.append(Finding(column, f"{message} ({count} times, first at {where})"))

    def run(self) -> Totals:
        with np.errstate(invalid="ignore", over="ignore"):
            self.flag("length", (self.length_R < 1) | (self.length_R > self.spec.length), "is not between 1 and T")
            if self.totals.findings:
                return self.totals  # nothing below can be judged without the lengths
            self.check_identity()
            self.check_text()
            self.check_logits()
            self.check_tails()
            self.check_target()
            if self.spec.block:
                self.check_maps()
            if self.spec.window:
                self.check_hidden()
            if self.spec.tail_samples:
                self.check_samples()
        return self.totals

    def check_identity(self) -> None:
        first = sequence_id(self.unit, self.first_row)
        expected_R = first + np.arange(len(self.length_R))
        self.flag("sequence_id", self.columns["sequence_id"] != expected_R, "is not (unit << 32) + row")
        if self.spec.packing == "stream":
            self.flag(
                "length", self.length_R != self.spec.length, "is shorter than T, though rows are packed as a stream"
            )

    def check_text(self) -> None:
        V, valid_RT = self.spec.vocab_size, self.valid_RT
        ids_RT, segment_RT, next_R = (self.columns[name] for name in ("input_ids", "segment_ids", "next_id"))
        self.flag("input_ids", (ids_RT < 0) | (ids_RT >= V), f"is no id below V={V}")
        self.flag("input_ids", (ids_RT != 0) & ~valid_RT, "is not 0 on padding")
        self.flag("next_id", (next_R < -1) | (next_R >= V), f"is neither -1 nor an id below V={V}")
        step_RT = np.diff(segment_RT, axis=1)
        self.flag("segment_ids", segment_RT[:, 0] != 0, "does not begin at 0")
        wrong_RT = ((step_RT < 0) | (step_RT > 1)) & valid_RT[:, 1:]
        self.flag("segment_ids", wrong_RT, "does not go up by 0 or 1 from a token to the next")
        self.flag("segment_ids", (segment_RT != 0) & ~valid_RT, "is not 0 on padding")
        last_R = segment_RT[np.arange(len(self.length_R)), self.length_R - 1]
        named_R = np.array([len(names) for names in self.columns["doc_ids"]])
        self.flag("doc_ids", named_R != last_R + 1, "does not name as many documents as segment_ids counts")
        if self.spec.packing == "document":
            self.flag("segment_ids", segment_RT != 0, "counts several documents, though rows hold one each")

    def check_logits(self) -> None:
        V, valid_RT1 = self.spec.vocab_size, self.valid_RT[..., None]
        z_RTK = self.columns["topk_logits"]
        ids_RTK = self.columns["topk_ids"].astype(np.int32)
        lse_RT = self.columns["lse"]
        self.flag("topk_ids", (ids_RTK < 0) | (ids_RTK >= V), f"is no id below V={V}")
        self.flag("topk_ids", (ids_RTK != 0) & ~valid_RT1, "is not 0 on padding")
        twice = (np.diff(np.sort(ids_RTK, axis=-1), axis=-1) == 0) & valid_RT1
        self.flag("topk_ids", twice, "names an id twice at one position")
        self.flag("topk_logits", ~np.isfinite(z_RTK) & valid_RT1, "is not finite")
        self.flag("topk_logits", ~np.isnan(z_RTK) & ~valid_RT1, "is not NaN on padding")
        self.flag("topk_logits", (np.diff(z_RTK, axis=-1) > 0) & valid_RT1, "is not in descending order")
        equal = (np.diff(z_RTK, axis=-1) == 0) & (np.diff(ids_RTK, axis=-1) < 0)
        self.flag("topk_ids", equal & valid_RT1, "is not in ascending order among equal logits")
        self.flag("lse", ~np.isfinite(lse_RT) & self.valid_RT, "is not finite")
        self.flag("lse", ~np.isnan(lse_RT) & ~self.valid_RT, "is not NaN on padding")
        self.flag("lse", (lse_RT < z_RTK[..., 0] - _slack(lse_RT)) & self.valid_RT, "is below the largest logit")

    def check_tails(self) -> None:
        spec = self.spec
        tail_RTS = self.columns["log_tail"].astype(np.float64)
        z_RTK = self.columns["topk_logits"].astype(np.float64)
        lse_RT = self.columns["lse"].astype(np.float64)
        valid_RT1 = self.valid_RT[..., None]
        self.flag("log_tail", (np.isnan(tail_RTS) | np.isposinf(tail_RTS)) & valid_RT1, "is NaN or infinite")
        self.flag("log_tail", ~np.isnan(tail_RTS) & ~valid_RT1, "is not NaN on padding")
        tail_one_RT = tail_RTS[..., spec.taus.index(1.0)]
        log_r_RT = tail_one_RT - lse_RT
        self.flag("log_tail", (log_r_RT > CLOSE) & self.valid_RT, "gives a tail mass above 1 at tau 1")
        whole_RT = np.logaddexp(_logsumexp(z_RTK), tail_one_RT)
        apart_RT = ~(np.abs(whole_RT - lse_RT) <= CLOSE) & self.valid_RT
        self.flag("lse", apart_RT, f"is not logaddexp(logsumexp(topk_logits), log_tail at tau 1) within {CLOSE:g} nats")
        outside = spec.vocab_size - spec.k
        most_RTS = (np.log(outside) if outside else -np.inf) + z_RTK[..., -1:] / np.asarray(spec.taus)
        over = (tail_RTS > most_RTS + CLOSE) & valid_RT1
        self.flag("log_tail", over, "is more than V-K ids at or below the smallest stored logit can weigh")
        self._check_convexity(tail_RTS)
        log_p_RTK = z_RTK - lse_RT[..., None]
        r_RT = np.exp(log_r_RT)
        entropy_RT = -(np.exp(log_p_RTK) * log_p_RTK).sum(-1) - np.where(r_RT > 0, r_RT * log_r_RT, 0.0)
        self.totals.entropy = float(entropy_RT[self.valid_RT].sum())
        self.totals.tail_mass = float(r_RT[self.valid_RT].sum())

    def _check_convexity(self, tail_RTS: np.ndarray) -> None:
        """log of a sum of exp(z/tau) is convex in 1/tau: temperatures stored in a wrong order do not pass."""
        inverse = 1.0 / np.asarray(self.spec.taus)
        for s in range(1, len(inverse) - 1):
            w = (inverse[s] - inverse[s + 1]) / (inverse[s - 1] - inverse[s + 1])
            chord_RT = w * tail_RTS[..., s - 1] + (1 - w) * tail_RTS[..., s + 1]
            above_RT = (tail_RTS[..., s] > chord_RT + CLOSE) & np.isfinite(chord_RT) & self.valid_RT
            self.flag("log_tail", above_RT, f"is not convex in 1/tau around tau {self.spec.taus[s]:g}")

    def check_target(self) -> None:
        target_RT = targets(self.columns, self.spec)
        given_RT = self.columns["target_logit"]
        z_RTK, ids_RTK = self.columns["topk_logits"], self.columns["topk_ids"]
        has_RT = target_RT >= 0
        slack_RT = _slack(given_RT)
        self.flag("target_logit", ~np.isfinite(given_RT) & has_RT, "is not finite")
        self.flag("target_logit", ~np.isnan(given_RT) & ~has_RT, "is not NaN where no token follows")
        self.flag("target_logit", (given_RT > z_RTK[..., 0] + slack_RT) & has_RT, "is above the largest logit")
        stored_RTK = (ids_RTK == target_RT[..., None]) & has_RT[..., None]
        wrong_RTK = stored_RTK & ~(np.abs(z_RTK - given_RT[..., None]) <= slack_RT[..., None])
        self.flag("target_logit", wrong_RTK.any(-1), "differs from the stored logit of the same id")
        above_RT = has_RT & ~stored_RTK.any(-1) & (given_RT > z_RTK[..., -1] + slack_RT)
        self.flag("target_logit", above_RT, "is above the smallest stored logit, though its id is not among the top k")

    def check_maps(self) -> None:
        n, b = self.spec.blocks, self.spec.block
        map_RGnn = self.columns["attn_map"].astype(np.float32)
        used_R1n = (np.arange(n)[None, :] * b < self.length_R[:, None])[:, None, :]
        self.flag("attn_map", ~np.isfinite(map_RGnn), "is not finite")
        self.flag("attn_map", map_RGnn < 0, "is negative")
        self.flag("attn_map", np.triu(map_RGnn, 1) != 0, "is not zero above the diagonal")
        self.flag("attn_map", (map_RGnn != 0).any(-1) & ~used_R1n, "is not zero on padded blocks")
        sum_RGn = map_RGnn.sum(-1)
        self.flag("attn_map", (sum_RGn > 1 + CLOSE) & used_R1n, f"has a row that sums to more than 1 + {CLOSE:g}")
        self.flag("attn_map", (sum_RGn <= 0) & used_R1n, "has a valid row without any attention")
        used_RGn = np.broadcast_to(used_R1n, sum_RGn.shape)
        self.totals.sink_rows = int(np.count_nonzero(sum_RGn[used_RGn] < 1 - CLOSE))
        self.totals.least_row_sum = float(np.nanmin(sum_RGn[used_RGn]))

    def check_hidden(self) -> None:
        hidden_RWD = self.columns["hidden"]
        used_RW1 = (np.arange(self.spec.windows)[None, :] * self.spec.window < self.length_R[:, None])[..., None]
        self.flag("hidden", ~np.isfinite(hidden_RWD) & used_RW1, "is not finite")
        self.flag("hidden", (hidden_RWD != 0) & ~used_RW1, "is not zero on padded windows")

    def check_samples(self) -> None:
        V, valid_RT1 = self.spec.vocab_size, self.valid_RT[..., None]
        ids_RTM, z_RTM = self.columns["tail_ids"].astype(np.int32), self.columns["tail_logits"]
        least_RT1 = self.columns["topk_logits"][..., -1:]
        self.flag("tail_ids", (ids_RTM < 0) | (ids_RTM >= V), f"is no id below V={V}")
        self.flag("tail_ids", (ids_RTM != 0) & ~valid_RT1, "is not 0 on padding")
        self.flag("tail_logits", ~np.isnan(z_RTM) & ~valid_RT1, "is not NaN on padding")
        self.flag("tail_logits", ~np.isfinite(z_RTM) & valid_RT1, "is not finite")
        self.flag("tail_logits", (z_RTM > least_RT1) & valid_RT1, "is above the smallest of the top k")
        top_RTK = self.columns["topk_ids"]
        for m in range(self.spec.tail_samples):
            inside_RT = (top_RTK == ids_RTM[..., m : m + 1].astype(top_RTK.dtype)).any(-1) & self.valid_RT
            self.flag("tail_ids", inside_RT, "names an id of the top k")


def targets(columns: Columns, spec: CacheSpec) -> np.ndarray:
    """(R, T) int64: the id that follows each position, -1 where nothing does or the row has ended."""
    length_R = columns["length"].astype(np.int64)
    target_RT = np.full((len(length_R), spec.length), -1, dtype=np.int64)
    target_RT[:, :-1] = columns["input_ids"][:, 1:]
    target_RT[np.arange(spec.length)[None, :] >= length_R[:, None] - 1] = -1
    target_RT[np.arange(len(length_R)), length_R - 1] = columns["next_id"]
    return target_RT


def _slack(values: np.ndarray) -> np.ndarray:
    """What float32 rounding may add to a logit or a logsumexp."""
    return 1e-4 + 1e-6 * np.abs(values)


def _logsumexp(z_RTK: np.ndarray) -> np.ndarray:
    top_RT = z_RTK.max(-1)
    return top_RT + np.log(np.exp(z_RTK - top_RT[..., None]).sum(-1))
