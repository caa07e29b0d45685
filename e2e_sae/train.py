"""Training: set everything up and check it, then the loop, then the summary.

for each optimizer step:
    for each of its batches:
        clean pass                                     once, for all members
        for each member: spliced pass, loss, backward, with the last batch the optimizer step
    log, evaluate, save                                none of which changes the run
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from e2e_sae.acts import Pass, TokenBatch
from e2e_sae.checkpoint.files import write_json
from e2e_sae.checkpoint.records import HELD_OUT
from e2e_sae.checkpoint.run_dir import TIMING_FILE, RunDir
from e2e_sae.config import Config
from e2e_sae.data.batches import TokenBatches
from e2e_sae.data.prefetch import N_AHEAD, DataWait
from e2e_sae.errors import Interrupted, RunFailed
from e2e_sae.evaluate import Evaluation, evaluate_together, token_batches
from e2e_sae.group import group_config
from e2e_sae.health import report_health
from e2e_sae.interrupts import stop_requests
from e2e_sae.log import logger
from e2e_sae.member import Member
from e2e_sae.metrics import FiringCounts
from e2e_sae.models.runner import run_clean, run_spliced
from e2e_sae.precision import computing
from e2e_sae.progress import progress_bar
from e2e_sae.resume import Resumed, prepare_resume
from e2e_sae.saes import in_eval_mode
from e2e_sae.setup import set_up
from e2e_sae.stopwatch import Stopwatch
from e2e_sae.trackers import read_metrics
from e2e_sae.wandb_tracker import WandbTracker

T = TypeVar("T")


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
    seconds: float = 0.0
    """Spent training until the newest save, without evaluating and saving."""


class Turn(NamedTuple):
    """What every member trains on in its turn."""

    clean: Pass
    """The clean pass of a batch."""
    weight: float
    """The batch's share of the step's counted tokens."""
    step: int
    """Number of the optimizer step, counted from 0."""
    ends_step: bool
    """Whether it is the step's last batch."""


@dataclass
class Trainer:
    """The loop."""

    config: Config
    """What all members share: data, batch size, cadences."""
    lm: nn.Module
    """The frozen language model."""
    members: list[Member]
    """What is trained; one that fails is taken out."""
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
    logged_loss: float = float("nan")
    """The first member's loss in the newest line of the log: asking for it at every step would wait for the device."""
    last_firing: dict[Member, FiringCounts] = field(default_factory=dict)
    """How often latents fired in the last evaluation."""
    failures: list[str] = field(default_factory=list)
    """Members that have failed, and why."""
    watch: Stopwatch = field(init=False)
    """Runs while it trains."""

    def __post_init__(self) -> None:
        self.watch = Stopwatch(self.state.seconds)

    def run(self) -> None:
        """Trains to the end.

        Raises:
            Interrupted: a signal asked for it; everything is saved.
            RunFailed: a loss or gradient is not finite; of several members, in each.
        """
        started_at, wait = self.state.n_samples, DataWait(self.device)
        with (
            stop_requests() as stop,
            self._bar() as bar,
            closing(self._groups(wait)) as groups,
            self.watch.running(),
        ):
            for group, is_last in with_last(groups):
                self.train_step(group, is_last)
                n_tokens = (self.state.n_samples - started_at) * self.train_batches.n_ctx
                rate = f"{n_tokens / wait.elapsed:,.0f} tokens/s, waited {wait.share:.0%}"
                bar.set_postfix_str(f"loss {self.logged_loss:.4f}, {rate}", refresh=False)
                bar.update(self.state.n_samples - bar.n)
                if self._save_due(is_last):
                    self.state.saved_at = self.state.n_samples
                    self._save()
                elif stop:
                    self._save()
                if stop:
                    folders = [member.run_dir.path for member in self.members if member.run_dir is not None]
                    raise Interrupted(stop.signum or 0, *folders)
        if self.state.n_samples > started_at:
            logger.info(wait.summary(self.config.train_data))

    def train_step(self, group: list[TokenBatch], is_last: bool) -> None:
        """Makes one optimizer step from its batches, and logs what is due; else it does not wait for the device.

        Raises:
            RunFailed: a loss or gradient was not finite since the last line of the log; of several members, in each.
        """
        with computing(self.config.arithmetic, self.device):
            self._train_step(group, is_last)

    def _train_step(self, group: list[TokenBatch], is_last: bool) -> None:
        n_counted = sum(batch.n_counted for batch in group)
        for member in self.members:
            member.begin_step(self.state.n_steps)
        for i, batch in enumerate(group):
            is_first, ends_step = self.state.n_samples == 0, i == len(group) - 1
            want_logits = any(member.wants_logits for member in self.members)
            names = list(dict.fromkeys(name for member in self.members for name in member.clean_names))
            reuse = [member.model.positions for member in self.members if member.wants_logits]
            clean = run_clean(
                self.lm, batch, names, want_logits=want_logits, keep_logits=self._keeps_logits, reuse=reuse
            )
            turn = Turn(clean, batch.n_counted / n_counted if n_counted else 0.0, self.state.n_steps, ends_step)
            self.state.n_samples += len(batch.tokens)
            self.state.n_steps += ends_step
            evaluates = self._evaluation_due(is_first, ends_step and is_last)
            on_cadence = ends_step and self.state.n_steps % self.config.log_every_n_grad_steps == 0
            logs = is_first or (ends_step and is_last) or on_cadence or evaluates
            lines = self._each(lambda member, turn=turn, logs=logs: self._take_turn(member, turn, logs))
            if logs:
                self._log(lines, evaluates)

    @property
    def _keeps_logits(self) -> bool:
        """Whether the members compare more logits with the clean ones than there are: these are then computed once."""
        kls = [member.loss.logits_kl for member in self.members]
        return sum(kl.position_fraction for kl in kls if kl is not None) > 1

    def _take_turn(self, member: Member, turn: Turn, logs: bool) -> dict[str, Any]:
        """Lets a member train on a batch and returns its line of the log, if there is to be one. Nothing else of the
        batch outlives its turn: the latents of several members need not be in memory at once."""
        result = member.backward(turn.clean, turn.weight, turn.step)
        norm = member.step(turn.step, result) if turn.ends_step else None
        member.window.update(result.spliced, self.state.n_samples)
        if not logs:
            return {}
        member.check()
        return {
            "samples": self.state.n_samples,
            "grad_updates": self.state.n_steps,
            "total_tokens": self.state.n_samples * self.train_batches.n_ctx,
            "lr": member.lr_at(turn.step),
            **({} if norm is None else {"grad_norm": norm.item()}),
            **member.measure(result),
        }

    def _log(self, lines: dict[Member, dict[str, Any]], evaluates: bool) -> None:
        """Hands every member its line, with an evaluation in it if one is due."""
        if evaluates:
            self.last_firing = {}
            self.state.evaluated_at = self.state.n_samples
            for member, evaluation in self._evaluate(list(lines)).items():
                lines[member] |= evaluation.log_values()
                self.last_firing[member] = evaluation.firing
                ce = evaluation.metrics["performance/eval/ce_increase"]
                l0 = [v for k, v in evaluation.metrics.items() if k.startswith("sparsity/eval/L_0/")]
                whose = f" ({member.label})" if member.label else ""
                logger.info(
                    f"evaluation at {self.state.n_samples} samples{whose}: CE increase {ce:.4f}, "
                    f"L0 {', '.join(f'{v:.1f}' for v in l0)}"
                )
        for member, line in lines.items():
            member.log(line)
        self.logged_loss = next(iter(lines.values()))["loss"]

    def _each(self, act: Callable[[Member], T]) -> dict[Member, T]:
        """Lets every member act and returns what came of it. One that fails is left out from then on.

        Raises:
            RunFailed: no member is left.
        """
        results: dict[Member, T] = {}
        for member in list(self.members):
            try:
                results[member] = act(member)
            except RunFailed as error:
                if not member.label:
                    raise
                self.members.remove(member)
                self.failures.append(f"{member.label}: {error}")
                logger.error(f"left out from here on: {self.failures[-1]}")
                member.close(failed=True)
        if not self.members:
            raise self.failure()
        return results

    def failure(self) -> RunFailed:
        """Returns the error that names the members that have failed."""
        n_members = len(self.failures) + len(self.members)
        return RunFailed("\n  ".join([f"{len(self.failures)} of {n_members} members failed", *self.failures]))

    def _evaluation_due(self, is_first: bool, is_last: bool) -> bool:
        every = self.config.eval_every_n_samples
        if every is None or self.eval_batches is None:
            return False
        since = self.state.n_samples - self.state.evaluated_at
        return is_last or (every > 0 and (is_first or since >= every))

    def _evaluate(self, members: Sequence[Member]) -> dict[Member, Evaluation]:
        assert self.eval_batches is not None
        data = self.config.eval_data or self.config.train_data
        n_samples = self.config.eval_n_samples or self.eval_batches.n_samples
        batch_size = self.config.batch_size
        n_batches = None if n_samples is None else -(-n_samples // batch_size)
        tokens = token_batches(self.eval_batches, batch_size, n_samples, data.exclude_token_ids, self.device)
        with (
            self.watch.stopped(),
            computing(self.config.arithmetic, self.device),
            closing(tokens) as batches,
            ExitStack() as averaged,
        ):
            for member in members:
                averaged.enter_context(member.averaged())
            found = evaluate_together([(member.model, member.final_loss) for member in members], batches, n_batches)
        return dict(zip(members, found, strict=True))

    def evaluated_firing(self, member: Member) -> FiringCounts | None:
        """Returns how often each latent fires on the held-out data, if it was just evaluated there."""
        return self.last_firing.get(member) if self.state.evaluated_at == self.state.n_samples else None

    def final_firing(self, member: Member) -> tuple[FiringCounts, str]:
        """Returns how often each latent fires at the end, and on which data that was counted."""
        if self.eval_batches is not None:
            firing = self.evaluated_firing(member) or self._evaluate([member])[member].firing
            return firing, HELD_OUT
        saes = member.model.saes_at()
        firing = FiringCounts({position.name: sae.d_sae for position, sae in saes.items()})
        n_samples = max(1, self.config.act_frequency_n_tokens // self.train_batches.n_ctx)
        excluded = self.config.train_data.exclude_token_ids
        tokens = token_batches(self.train_batches, self.config.batch_size, n_samples, excluded, self.device)
        with (
            torch.inference_mode(),
            in_eval_mode(saes.values()),
            member.averaged(),
            computing(self.config.arithmetic, self.device),
            closing(tokens) as batches,
        ):
            for batch in batches:
                firing.update(run_spliced(self.lm, batch, saes))
        return firing, "the first of the training data"

    def _save_due(self, is_last: bool) -> bool:
        every = self.config.save_every_n_samples
        return is_last or (every is not None and self.state.n_samples - self.state.saved_at >= every)

    def _save(self) -> None:
        self.state.seconds = self.watch.seconds
        loop_state = {"loop": vars(self.state).copy()}
        with self.watch.stopped():
            self._each(lambda m: m.save(self.state.n_samples, self.state.n_steps, loop_state, self.evaluated_firing(m)))

    def timing(self) -> dict[str, float | int]:
        """Returns how long it has trained; of several members, all of them together."""
        seconds, n_tokens = self.watch.seconds, self.state.n_samples * self.train_batches.n_ctx
        return {"seconds": seconds, "tokens_per_second": n_tokens / seconds, "members": len(self.members)}

    def _groups(self, wait: DataWait) -> Generator[list[TokenBatch], None, None]:
        """Yields the batches of each optimizer step that is still to be made; `wait` is told how long they took."""
        config, group = self.config, []
        n_left = None if self.n_groups is None else self.n_groups - self.state.n_steps
        if n_left is not None and n_left <= 0:
            return
        excluded = config.train_data.exclude_token_ids
        # `with_last` takes all of the next step's batches at once.
        n_ahead, start = config.n_accumulation + N_AHEAD - 1, self.state.n_samples
        with closing(
            token_batches(self.train_batches, config.batch_size, None, excluded, self.device, start, wait, n_ahead)
        ) as batches:
            for batch in batches:
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


def train(
    config: Config, resume: Sequence[Resumed] = (), wandb: WandbTracker | None = None, lm: nn.Module | None = None
) -> Path | None:
    """Trains what the config says and returns the run's folder (None if nothing is written), with `members` the first.

    Args:
        config: what to do.
        resume: the old runs that go on, one for each member.
        wandb: a W&B run that has been started already; None: one is started if the config asks for it.
        lm: the config's language model, if it has been loaded already.

    Raises:
        UserError: the config asks for something that is not there or does not fit together.
        RunFailed: a loss or gradient became non-finite; of several members, the others are finished.
        Interrupted: a signal stopped it; the run is saved.
    """
    return train_members(config, resume, wandb, lm)[0]


def train_members(
    config: Config, resume: Sequence[Resumed] = (), wandb: WandbTracker | None = None, lm: nn.Module | None = None
) -> list[Path | None]:
    """Does what `train` does, and returns the folder of each member."""
    parts = set_up(config, resume, wandb, lm)
    loop_state = resume[0].loop_state if resume else None
    trainer = Trainer(
        config=config,
        lm=parts.lm,
        members=list(parts.members),
        train_batches=parts.train_batches,
        eval_batches=parts.eval_batches,
        n_groups=parts.n_groups,
        device=parts.device,
        state=LoopState(**loop_state) if loop_state else LoopState(),
    )
    finished: set[Member] = set()
    with ExitStack() as stack:
        for member in reversed(parts.members):
            stack.callback(lambda m=member: m.close(failed=m not in finished))
        trainer.run()
        for member in trainer.members:
            _summarise(trainer, member)
            finished.add(member)
    if trainer.failures:
        raise trainer.failure()
    return [member.run_dir and member.run_dir.path for member in parts.members]


def _summarise(trainer: Trainer, member: Member) -> None:
    firing, data = trainer.final_firing(member)
    member.log_final_firing(firing)
    lines = read_metrics(member.run_dir.metrics_file) if member.run_dir else member.lines
    if member.run_dir is not None and trainer.watch.seconds:
        write_json(member.run_dir.path / TIMING_FILE, trainer.timing())
    if member.label:
        logger.info(f"\n{member.label}")
    report_health(lines, firing, data, member.run_dir, member.final_loss.sparsity.target_l0)


def resume_training(run_dir: str | Path | Sequence[str | Path], config: Config | None = None) -> Path:
    """Continues an interrupted run from its newest whole checkpoint, or the runs of several members together.

    Args:
        run_dir: its folder; several folders: those of members that go on over one clean pass, from the newest
            checkpoint that all of them have.
        config: must not change the mathematics; None: the run's own. For one run only.

    Returns:
        The folder; of several, the first.

    Raises:
        UserError: there is no such run, the config changes what is computed, or the runs do not go together.
    """
    paths = [run_dir] if isinstance(run_dir, str | Path) else list(run_dir)
    resumed = prepare_resume(paths, config)
    if resumed:
        train(group_config([old.config for old in resumed]), resumed)
    return RunDir.open(paths[0]).path


def with_last(groups: Iterable[list[TokenBatch]]) -> Iterator[tuple[list[TokenBatch], bool]]:
    """Yields each group with whether it is the last: reads one ahead, so it also works on a stream."""
    previous: list[TokenBatch] | None = None
    for group in groups:
        if previous is not None:
            yield previous, False
        previous = group
    if previous is not None:
        yield previous, True
