"""Training: set everything up and check it, then the loop, then the summary.

for each optimizer step:
    for each of its batches:
        clean pass                                     once, for all members
        for each member: spliced pass, loss, backward
    for each member: optimizer step
    log, evaluate, save                                none of which changes the run
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from e2e_sae.acts import TokenBatch
from e2e_sae.config import Config
from e2e_sae.data.batches import TokenBatches
from e2e_sae.errors import Interrupted
from e2e_sae.evaluate import Evaluation, evaluate, token_batches
from e2e_sae.health import report_health
from e2e_sae.interrupts import stop_requests
from e2e_sae.log import logger
from e2e_sae.member import BatchResult, Member
from e2e_sae.metrics import FiringCounts
from e2e_sae.models.runner import run_clean, run_spliced
from e2e_sae.progress import progress_bar
from e2e_sae.setup import Resumed, prepare_resume, set_up
from e2e_sae.trackers import read_metrics
from e2e_sae.wandb_tracker import WandbTracker


@dataclass
class LoopState:
    """Where in the run it is."""

    n_samples: int = 0
    """Sequences trained on."""
    n_steps: int = 0
    """Optimizer steps made."""
    evaluated_at: int = 0
    """n_samples at the last evaluation."""
    saved_at: int = 0
    """n_samples at the last save that was due; one made for an interruption moves no later save."""


@dataclass
class Trainer:
    """The loop."""

    config: Config
    """What all members share: data, batch size, cadences."""
    lm: nn.Module
    """The frozen language model."""
    members: list[Member]
    """What is trained."""
    train_batches: TokenBatches
    """Rows to train on."""
    eval_batches: TokenBatches | None
    """Held-out rows."""
    n_groups: int | None
    """Planned optimizer steps; None: until the data end."""
    device: torch.device
    """Of the language model."""
    state: LoopState = field(default_factory=LoopState)
    """Where it is."""
    last_firing: list[FiringCounts] = field(default_factory=list)
    """How often latents fired in the last evaluation, by member."""

    def run(self) -> None:
        """Trains to the end.

        Raises:
            Interrupted: a signal asked for it; everything is saved.
            RunFailed: a loss or gradient is not finite.
        """
        started_at, started = self.state.n_samples, time.perf_counter()
        with stop_requests() as stop, self._bar() as bar:
            for group, is_last in with_last(self._groups()):
                loss = self.train_step(group, is_last)
                n_tokens = (self.state.n_samples - started_at) * self.train_batches.n_ctx
                rate = n_tokens / (time.perf_counter() - started)
                bar.set_postfix_str(f"loss {loss:.4f}, {rate:,.0f} tokens/s", refresh=False)
                bar.update(self.state.n_samples - bar.n)
                if self._save_due(is_last):
                    self.state.saved_at = self.state.n_samples
                    self._save()
                elif stop:
                    self._save()
                if stop:
                    raise Interrupted(stop.signum or 0, self.members[0].run_dir and self.members[0].run_dir.path)

    def train_step(self, group: list[TokenBatch], is_last: bool) -> float:
        """Makes one optimizer step from its batches, logs what is due, and returns the last batch's loss."""
        n_counted = sum(batch.n_counted for batch in group)
        loss = float("nan")
        for i, batch in enumerate(group):
            is_first, ends_step = self.state.n_samples == 0, i == len(group) - 1
            want_logits = any(member.wants_logits for member in self.members)
            names = list(dict.fromkeys(name for member in self.members for name in member.clean_names))
            reuse = [member.model.positions for member in self.members if member.wants_logits]
            clean = run_clean(self.lm, batch, names, want_logits=want_logits, reuse=reuse)
            weight = batch.n_counted / n_counted if n_counted else 0.0
            results = [member.backward(clean, weight, self.state.n_steps) for member in self.members]
            lrs = [member.lr_at(self.state.n_steps) for member in self.members]
            self.state.n_samples += len(batch.tokens)
            norms: list[float] = []
            if ends_step:
                norms = [member.step(self.state.n_steps) for member in self.members]
                self.state.n_steps += 1
            for member, result in zip(self.members, results, strict=True):
                member.window.update(result.spliced, self.state.n_samples)
            self._observe(results, lrs, norms, is_first, ends_step and is_last)
            loss = results[0].total.item()
        return loss

    def _observe(
        self, results: list[BatchResult], lrs: list[float], norms: list[float], is_first: bool, is_last: bool
    ) -> None:
        """Evaluates and logs, where due."""
        evaluates = self._evaluation_due(is_first, is_last)
        if evaluates:
            self.last_firing = []
        on_cadence = bool(norms) and self.state.n_steps % self.config.log_every_n_grad_steps == 0
        if not (is_first or is_last or on_cadence or evaluates):
            return
        for i, (member, result) in enumerate(zip(self.members, results, strict=True)):
            line: dict[str, Any] = {
                "samples": self.state.n_samples,
                "grad_updates": self.state.n_steps,
                "total_tokens": self.state.n_samples * self.train_batches.n_ctx,
                "lr": lrs[i],
                **({"grad_norm": norms[i]} if norms else {}),
                **member.measure(result),
            }
            if evaluates:
                evaluation = self._evaluate(member)
                line |= evaluation.log_values()
                self.last_firing.append(evaluation.firing)
                ce = evaluation.metrics["performance/eval/ce_increase"]
                l0 = [v for k, v in evaluation.metrics.items() if k.startswith("sparsity/eval/L_0/")]
                logger.info(
                    f"evaluation at {self.state.n_samples} samples: CE increase {ce:.4f}, "
                    f"L0 {', '.join(f'{v:.1f}' for v in l0)}"
                )
            member.log(line)
        if evaluates:
            self.state.evaluated_at = self.state.n_samples

    def _evaluation_due(self, is_first: bool, is_last: bool) -> bool:
        every = self.config.eval_every_n_samples
        if every is None or self.eval_batches is None:
            return False
        since = self.state.n_samples - self.state.evaluated_at
        return is_last or (every > 0 and (is_first or since >= every))

    def _evaluate(self, member: Member) -> Evaluation:
        assert self.eval_batches is not None
        data = self.config.eval_data or self.config.train_data
        n_samples = self.config.eval_n_samples or self.eval_batches.n_samples
        batch_size = self.config.batch_size
        batches = token_batches(self.eval_batches, batch_size, n_samples, data.exclude_token_ids, self.device)
        n_batches = None if n_samples is None else -(-n_samples // batch_size)
        return evaluate(member.model, batches, member.config.loss, n_batches)

    def final_firing(self, member: Member) -> tuple[FiringCounts, str]:
        """Returns how often each latent fires at the end, and on which data that was counted."""
        if self.eval_batches is not None:
            if self.last_firing and self.state.evaluated_at == self.state.n_samples:
                return self.last_firing[self.members.index(member)], "held-out data"
            return self._evaluate(member).firing, "held-out data"
        saes = member.model.saes_at()
        firing = FiringCounts({position.name: sae.d_sae for position, sae in saes.items()})
        n_samples = max(1, self.config.act_frequency_n_tokens // self.train_batches.n_ctx)
        excluded = self.config.train_data.exclude_token_ids
        with torch.inference_mode():
            for batch in token_batches(self.train_batches, self.config.batch_size, n_samples, excluded, self.device):
                firing.update(run_spliced(self.lm, batch, saes))
        return firing, "the first of the training data"

    def _save_due(self, is_last: bool) -> bool:
        every = self.config.save_every_n_samples
        return is_last or (every is not None and self.state.n_samples - self.state.saved_at >= every)

    def _save(self) -> None:
        for member in self.members:
            member.save(self.state.n_samples, self.state.n_steps, {"loop": vars(self.state).copy()})

    def _groups(self) -> Iterator[list[TokenBatch]]:
        """Yields the batches of each optimizer step that is still to be made."""
        config, group = self.config, []
        n_left = None if self.n_groups is None else self.n_groups - self.state.n_steps
        if n_left is not None and n_left <= 0:
            return
        excluded = config.train_data.exclude_token_ids
        for batch in token_batches(
            self.train_batches, config.batch_size, None, excluded, self.device, self.state.n_samples
        ):
            group.append(batch)
            if len(group) < config.n_accumulation:
                continue
            yield group
            group = []
            n_left = None if n_left is None else n_left - 1
            if n_left == 0:
                return
        if group:
            logger.info(f"the data end with {len(group)} batches that make no whole optimizer step: dropped")
        if n_left:
            logger.warning(f"the data ended {n_left} optimizer steps before n_samples={config.n_samples}")

    def _bar(self) -> Any:
        total = None if self.n_groups is None else self.n_groups * self.config.samples_per_step
        if total is not None and self.train_batches.n_samples is not None:
            total = min(total, self.train_batches.n_samples)  # the last batch may be short
        return progress_bar(total=total, initial=self.state.n_samples, desc="training", unit="sample")


def train(config: Config, resume: Resumed | None = None, wandb: WandbTracker | None = None) -> Path | None:
    """Trains what the config says and returns the run's folder (None if nothing is written).

    Args:
        config: what to do.
        resume: the old run that goes on.
        wandb: a W&B run that has been started already; None: one is started if the config asks for it.

    Raises:
        UserError: the config asks for something that is not there or does not fit together.
        RunFailed: a loss or gradient became non-finite.
        Interrupted: a signal stopped it; the run is saved.
    """
    parts = set_up(config, resume, wandb)
    trainer = Trainer(
        config=config,
        lm=parts.lm,
        members=[parts.member],
        train_batches=parts.train_batches,
        eval_batches=parts.eval_batches,
        n_groups=parts.n_groups,
        device=parts.device,
        state=LoopState(**resume.loop_state) if resume and resume.loop_state else LoopState(),
    )
    member, failed = parts.member, True
    try:
        trainer.run()
        firing, data = trainer.final_firing(member)
        member.log_final_firing(firing)
        lines = read_metrics(member.run_dir.metrics_file) if member.run_dir else member.lines
        report_health(lines, firing, data, member.run_dir)
        failed = False
    finally:
        member.close(failed)
    return member.run_dir.path if member.run_dir else None


def resume_training(run_dir: str | Path, config: Config | None = None) -> Path:
    """Continues an interrupted run from its newest whole checkpoint.

    Args:
        run_dir: its folder.
        config: must not change the mathematics; None: the run's own.

    Raises:
        UserError: there is no such run, or the config changes what is computed.
    """
    resumed = prepare_resume(run_dir, config)
    if not resumed.is_finished:
        train(resumed.config, resumed)
    return resumed.run_dir.path


def with_last(groups: Iterable[list[TokenBatch]]) -> Iterator[tuple[list[TokenBatch], bool]]:
    """Yields each group with whether it is the last: reads one ahead, so it also works on a stream."""
    previous: list[TokenBatch] | None = None
    for group in groups:
        if previous is not None:
            yield previous, False
        previous = group
    if previous is not None:
        yield previous, True
