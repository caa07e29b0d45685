"""One independent set of SAEs in training: its losses, optimizer, statistics, run folder and trackers.

Several members can train on one clean pass; each ends where it would have ended alone.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

import e2e_sae
from e2e_sae.acts import Mean, Pass
from e2e_sae.checkpoint.records import HELD_OUT, CheckpointInfo, StoredModel, StoredSAEInfo
from e2e_sae.checkpoint.run_dir import RunDir
from e2e_sae.config import Config
from e2e_sae.dead_latents import DeadLatents
from e2e_sae.errors import RunFailed
from e2e_sae.evaluate import Measurements, ablated_ce, clean_names
from e2e_sae.guarded_optimizer import GuardedOptimizer
from e2e_sae.log import logger
from e2e_sae.losses import LossConfigs, weighted_loss
from e2e_sae.metrics import FiringCounts, FiringWindow
from e2e_sae.models.runner import run_local, run_spliced
from e2e_sae.models.sae_transformer import SAETransformer
from e2e_sae.optim import lr_factor
from e2e_sae.phases import Phase, phase_at
from e2e_sae.saes.scaling import folded
from e2e_sae.sparsity_control import SparsityControl, Stage
from e2e_sae.trackers import Tracker
from e2e_sae.weight_average import AveragedSAEs


class BatchResult(NamedTuple):
    """What a batch gave, before the optimizer step."""

    clean: Pass
    """The clean pass."""
    spliced: Pass
    """The spliced pass."""
    total: Float[Tensor, ""]
    """The weighted loss, undivided by accumulation; detached."""
    values: dict[str, Mean]
    """Unweighted losses by log name."""
    coeffs: Mapping[str, float | Float[Tensor, ""]]
    """Sparsity coefficients by log name of what they weigh; none where they are constant."""


class Member:
    """SAEs and everything that belongs to their training alone."""

    def __init__(
        self,
        config: Config,
        model: SAETransformer,
        phases: list[Phase],
        stages: list[Stage],
        run_dir: RunDir | None,
        stored_model: StoredModel,
    ):
        self.config = config
        self.model = model
        self.run_dir = run_dir
        """None: nothing is written."""
        self.label = ""
        """Names it in what is said, where there are several."""
        self.trackers: list[Tracker] = []
        self.lines: list[dict[str, Any]] = []
        """What was logged, where there is no run folder to read it from."""
        self._phases = phases
        self._stored_model = stored_model
        self._saes = model.saes_at()
        trained = [(p, sae.d_sae) for sae in self._saes.values() for p in sae.parameters() if p.requires_grad]
        self._optimizer = GuardedOptimizer(
            [parameter for parameter, _ in trained],
            config.max_grad_norm,
            name=config.optimizer,
            betas=config.betas,
            weight_decay=config.weight_decay,
            lr_factors=[lr_factor(config.lr_scaling, d_sae) for _, d_sae in trained],
        )
        for sae in self._saes.values():
            sae.train(any(parameter.requires_grad for parameter in sae.parameters()))
        self._averaged = AveragedSAEs(self._saes, self._optimizer, config.ema_decay)
        self._enter(phases[0])
        training = [position.name for position, sae in self._saes.items() if sae.training]
        self._sparsity = SparsityControl(stages, training, config.samples_per_step, trained[0][0].device)
        dead = config.dead_latents
        self._dead = None if dead is None else DeadLatents(dead, self._saes, config.seed, config.n_samples)
        self.window = FiringWindow(
            {position.name: sae.d_sae for position, sae in self._saes.items()},
            every_n_samples=config.collect_act_frequency_every_n_samples,
            n_tokens=config.act_frequency_n_tokens,
        )

    def begin_step(self, step: int) -> None:
        """Takes up the phase of the optimizer step with this number, counted from 0."""
        phase = phase_at(self._phases, step)
        if phase is not self._phase:
            self._enter(phase)
        if len(self._phases) > 1 and step == phase.first_step:
            whose = f" ({self.label})" if self.label else ""
            which = f"phase {phase.number} of {len(self._phases)} at {step * self.config.samples_per_step} samples"
            logger.info(f"{which}{whose}: {phase.description}")

    def _enter(self, phase: Phase) -> None:
        self._phase = phase
        self._terms = phase.loss.terms
        in_to_orig = phase.loss.in_to_orig
        self._downstream_names = list(in_to_orig.hook_positions) if in_to_orig else []

    @property
    def loss(self) -> LossConfigs:
        """The loss of the phase that it is in."""
        return self._phase.loss

    @property
    def final_loss(self) -> LossConfigs:
        """The loss of its last phase, with which it is evaluated."""
        return self._phases[-1].loss

    @property
    def wants_logits(self) -> bool:
        """Whether the loss needs the model to run to the end."""
        return self.loss.needs_downstream

    @property
    def clean_names(self) -> list[str]:
        """Hook points that it needs from the clean pass."""
        return clean_names(self._saes, self._downstream_names)

    def lr_at(self, step: int) -> float:
        """Returns the learning rate of the optimizer step with this number, counted from 0."""
        return phase_at(self._phases, step).lr_at(step)

    def backward(self, clean: Pass, weight: float, step: int) -> BatchResult:
        """Runs the spliced pass of a batch and adds `weight` times its loss's gradient; see `check`.

        Args:
            clean: holds the activations at `clean_names`, and logits if they are wanted.
            weight: the batch's share of the step's counted tokens.
            step: number of the optimizer step it belongs to, counted from 0.
        """
        for sae in self._saes.values():
            if sae.training:
                sae.before_batch(clean.batch.start)
        if self.wants_logits:
            spliced = run_spliced(self.model.tlens_model, clean.batch, self._saes, self._downstream_names, clean)
        else:
            clean = replace(clean, output=None)  # there for other members, and in this one's log only beside them
            spliced = run_local(clean, self._saes)
        coeffs = self._sparsity.coeffs(step)
        total, values = weighted_loss(self._terms, clean, spliced, coeffs, self.loss.kl_balance)
        self._sparsity.observe(step, spliced)
        if self._dead is not None:
            self._dead.update(spliced)
            total, values = self._dead.add_auxk(spliced, total, values)
        self._optimizer.watch(step, total, values)
        (total * weight).backward()
        return BatchResult(clean, spliced, total.detach(), values, coeffs)

    def step(self, step: int, last: BatchResult) -> Float[Tensor, ""]:
        """Makes an optimizer step, unless something was not finite, and returns the gradient's norm before clipping.

        Args:
            step: its number, counted from 0.
            last: what the last of its batches gave.
        """
        norm = self._optimizer.step(step, self.lr_at(step))
        for position, sae in self._saes.items():
            if sae.training:
                sae.after_step(last.spliced.sae_acts[position.name])
        if self._dead is not None:
            self._dead.resample(last.spliced, self._optimizer)
        self._averaged.update(last.spliced)
        self._sparsity.move(step)
        return norm

    def averaged(self) -> AbstractContextManager[None]:
        """Gives its SAEs, while the block is open, the weights that are evaluated and saved: averages, if there are."""
        return self._averaged.in_place()

    def check(self) -> None:
        """Waits for the device and asks whether everything was finite.

        Raises:
            RunFailed: a loss or gradient was not; that step has not been made, nor any after it.
        """
        trouble = self._optimizer.trouble()
        if trouble is not None:
            self._fail(trouble.step, trouble.what)

    def measure(self, result: BatchResult) -> dict[str, float | int]:
        """Returns the training metrics of one batch by log key; changes nothing."""
        measurements = Measurements("train", self._terms, [position.name for position in self._saes])
        with torch.no_grad():
            measurements.update(result.clean, result.spliced, result.values)
            if result.clean.output is not None:
                measurements.update_ablated(ablated_ce(self.model.tlens_model, result.clean, self.model.positions))
        dead = {} if self._dead is None else self._dead.log_values()
        phase = {"phase": self._phase.number} if len(self._phases) > 1 else {}
        coeffs = {f"sparsity/coeff/{key.removeprefix('sparsity/')}": float(c) for key, c in result.coeffs.items()}
        return {**phase, "loss": result.total.item(), **measurements.compute(), **coeffs, **dead}

    def save(
        self, n_samples: int, n_steps: int, loop_state: dict[str, Any], evaluated: FiringCounts | None = None
    ) -> None:
        """Writes a checkpoint into the run folder, if there is one.

        Args:
            n_samples: samples so far.
            n_steps: steps so far.
            loop_state: of the training loop.
            evaluated: how often each latent fires on held-out data now; None: a window of training data says it.

        Raises:
            RunFailed: see `check`.
        """
        self.check()
        if self.run_dir is None:
            return
        infos: dict[str, StoredSAEInfo] = {}
        for position, sae in self._saes.items():
            if not all(parameter.isfinite().all() for parameter in sae.parameters()):
                self._fail(n_steps, f"the SAE at {position.name} is not finite any more")
            infos[position.name] = StoredSAEInfo(
                architecture=sae.architecture,
                options=sae.config.to_dict(),
                read=position.read,
                write=position.write,
                d_in=sae.d_in,
                d_out=sae.d_out,
                d_sae=sae.d_sae,
                dtype=str(sae.dtype).removeprefix("torch."),
                scales=(sae.scales.read, sae.scales.write),
            )
        counts = self.window.latest if evaluated is None else evaluated
        info = CheckpointInfo(
            library_version=e2e_sae.__version__,
            n_samples=n_samples,
            n_steps=n_steps,
            model=self._stored_model,
            saes=infos,
            firing_data="a window of training data" if evaluated is None else HELD_OUT,
            firing_n_tokens=counts.n_tokens,
            files={},
        )
        state = self.state()
        with self.averaged():
            tensors = {position.name: folded(sae, sae.stored_tensors) for position, sae in self._saes.items()}
            path = self.run_dir.save(info, tensors, counts.counts, {**loop_state, **state})
        for tracker in self.trackers:
            tracker.save(path)

    def state(self) -> dict[str, Any]:
        """Returns what an exact continuation needs besides the SAEs' parameters."""
        state: dict[str, Any] = {"optimizer": self._optimizer.state_dict(), "window": self.window.state()}
        state["sparsity"] = self._sparsity.state()
        state |= self._averaged.state()
        return state if self._dead is None else {**state, "dead": self._dead.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues from `state`."""
        self._optimizer.load_state_dict(state["optimizer"])
        self.window.load_state(state["window"])
        if "sparsity" in state:  # not in checkpoints of versions that moved no coefficient
            self._sparsity.load_state(state["sparsity"])
        self._averaged.load_state(state)
        if self._dead is not None:
            self._dead.load_state(state["dead"])

    def log(self, line: dict[str, Any]) -> None:
        """Hands a line to every tracker, and the window of firing counts that has closed since the last one."""
        closed = self.window.take_closed()
        if closed is not None:
            line |= closed.log_values()
        if self.run_dir is None:
            self.lines.append(line)
        for tracker in self.trackers:
            tracker.log(line)
            if closed is not None:
                tracker.firing(closed, line["samples"])

    def log_final_firing(self, counts: FiringCounts) -> None:
        """Hands every tracker how often latents fire at the end."""
        for tracker in self.trackers:
            tracker.firing(counts, None)

    def close(self, failed: bool = False) -> None:
        """Closes the trackers."""
        for tracker in self.trackers:
            tracker.close(failed)

    def _fail(self, step: int, what: str) -> None:
        saved = self.run_dir.checkpoints()[:1] if self.run_dir else []
        kept = f"the last checkpoint is {saved[0]}" if saved else "no checkpoint had been saved"
        raise RunFailed(
            f"{what} at step {step + 1}: stopped before that optimizer step; {kept}. "
            "Try a lower lr, a warm-up, or max_grad_norm"
        )
