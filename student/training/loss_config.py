"""What the training loss is made of: terms, weights, schedules, and what each needs of the cache.

`student/losses` computes the terms, `module.py` puts them together; docs/losses.md says how they differ.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import UserError
from student.losses.attention import Sign, Sinks
from student.losses.frobenius import require_hidden
from student.losses.sparse_kd import Divergence, interpolation_weights
from student.training.schedule import DeltaSchedule


@dataclass(frozen=True)
class LossConfig:
    """L = (1 - alpha - beta) CE + alpha tau^2 KL + beta L_F + gamma L_A."""

    kl: Divergence = "tail"
    """What stands for the KL to the teacher. tail: KL_{K+1}, over the K ids and all others as one; renormalised: over
    the K ids alone, both distributions divided by their mass there (biased; to compare with); sampled: over the whole
    vocabulary on average, from the K ids and the cache's draws from the tail (needs `tail_ids`)."""
    alpha_start: float = 0.8
    """Weight of the KL at the first step of the first epoch, 0 to 1; 0 switches the term off."""
    alpha_end: float = 0.5
    """Weight of the KL that it falls towards; the same as alpha_start, or delta null: it stays."""
    tau_start: float = 2.0
    """Temperature of both distributions at the first step of the first epoch; within the cache's stored range."""
    tau_end: float = 1.0
    """Temperature that it falls towards."""
    delta: float | None = 0.05
    """Delta-distillation: what each epoch takes off the starting alpha and tau; null: both stay at their start."""
    beta: float = 0.1
    """Weight of the Frobenius term on hidden states; needs a cache with `hidden`. 0 switches it off."""
    gamma: float = 0.0
    """Weight of the attention alignment; needs a cache with `attn_map` and an mLSTM block. 0 switches it off."""
    attention_sign: Sign = "signed"
    """Negative entries of the implicit attention: compared as they are, or by magnitude."""
    attention_sinks: Sinks = "keep"
    """The first key block, where attention parks: compared, or dropped before rows are normalised."""
    attention_normalise_rows: bool = True
    """Compare the shape of rows only: each row of both maps is divided by the sum of its magnitudes."""
    chunk_rows: int = 512
    """Tokens whose logits exist at one time."""

    def alpha(self) -> DeltaSchedule:
        return DeltaSchedule(self.alpha_start, self.alpha_end, self.delta)

    def tau(self) -> DeltaSchedule:
        return DeltaSchedule(self.tau_start, self.tau_end, self.delta)

    def columns(self) -> tuple[str, ...]:
        """The columns that its terms read besides those every batch holds."""
        wanted = {
            "attn_map": self.gamma > 0,
            "hidden": self.beta > 0,
            "tail_ids": self.needs_draws,
            "tail_logits": self.needs_draws,
        }
        return tuple(name for name, needed in wanted.items() if needed)

    @property
    def needs_draws(self) -> bool:
        return self.kl == "sampled" and self.alpha_start > 0

    def check(
        self,
        taus: tuple[float, ...],
        has_hidden: bool,
        has_maps: bool,
        mlstm_blocks: int,
        tail_samples: int | None,
    ) -> None:
        """Raise UserError naming the option that the cache or the student cannot serve.

        Args:
            tail_samples: M, draws of every position's tail that the caches hold; None where fewer ids than theirs are
                trained on, whose tail is another one.
        """
        for name, start, end in (("alpha", self.alpha_start, self.alpha_end), ("tau", self.tau_start, self.tau_end)):
            if self.delta is not None and (self.delta < 0 or start < end):
                raise UserError(
                    f"--model.loss.{name}_start {start} must not be below --model.loss.{name}_end {end}, and "
                    f"--model.loss.delta {self.delta} not below 0: the schedule falls"
                )
        if self.needs_draws and tail_samples is None:
            raise UserError(
                "--model.loss.kl is sampled, but --data.k leaves ids out: the cache's draws are from the tail of all "
                "its ids, not from the larger one of fewer; leave --data.k out, or set --model.loss.kl to tail"
            )
        if self.needs_draws and not tail_samples:
            raise UserError(
                "--model.loss.kl is sampled, but the cache has no column `tail_ids`: set it to tail, or dump the cache "
                "again with tail_samples"
            )
        if min(self.alpha_start, self.alpha_end, self.beta, self.gamma) < 0 or self.alpha_start + self.beta > 1 + 1e-9:
            raise UserError(
                f"--model.loss: alpha_start {self.alpha_start} + beta {self.beta} must be at most 1 and no weight "
                "negative, for the cross-entropy gets what they leave"
            )
        if self.alpha_start > 0 and self.kl != "renormalised":
            for name, tau in (("tau_start", self.tau_start), ("tau_end", self.tau_end)):
                try:
                    interpolation_weights(taus, tau)
                except ValueError:
                    raise UserError(
                        f"--model.loss.{name} is {tau}, but the cache stores tails for tau {min(taus)} to {max(taus)}: "
                        "choose one in that range, or dump the cache again with others"
                    ) from None
        require_hidden(self.beta, has_hidden)
        if self.gamma > 0 and not has_maps:
            raise UserError(
                f"--model.loss.gamma is {self.gamma}, but the cache has no column `attn_map`: set it to 0, or dump the "
                "cache again with a pooling block"
            )
        if self.gamma > 0 and not mlstm_blocks:
            raise UserError(
                f"--model.loss.gamma is {self.gamma}, but the student has no mLSTM block to align: set it to 0, or "
                "change --model.student.slstm_at"
            )
