"""Trains a language model on next-token cross-entropy: one process, the same numbers for the same seed."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from e2e_sae.data.batches import IndexedBatches, PackedText, RowOrder, TokenBatches
from e2e_sae.errors import RunFailed, UserError
from e2e_sae.lm_training.config import LMTrainConfig
from e2e_sae.muon import Muon
from e2e_sae.optim import Schedule
from e2e_sae.progress import progress_bar
from e2e_sae.seeds import seed_for

LogitsFn = Callable[[Int[Tensor, "batch pos"]], Float[Tensor, "batch pos d_vocab"]]


class TrainResult(NamedTuple):
    """What a training came to."""

    n_tokens: int
    """Tokens seen, BOS included."""
    n_seconds: float
    """Time it took, evaluations included."""
    eval_ce: float | None
    """Held-out cross-entropy in nats per token; None without evaluation data."""


def next_token_ce(logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, ""]:
    """Returns the mean over predicted tokens of -log p(token | those before it), in nats."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


@torch.no_grad()
def held_out_ce(logits_of: LogitsFn, batches: TokenBatches, batch_size: int) -> float:
    """Returns the cross-entropy over all rows, in nats per predicted token."""
    total, n_rows = 0.0, 0
    for tokens in batches.iterate(batch_size):
        total += next_token_ce(logits_of(tokens), tokens).item() * len(tokens)
        n_rows += len(tokens)
    return total / n_rows


def n_rows_per_epoch(batches: TokenBatches, train: LMTrainConfig) -> int | None:
    """Returns the rows of one epoch; None if that is not known before its end (streamed data)."""
    text = _windowed(batches, train)
    return batches.n_samples if text is None else _n_windows(text)


def epoch_batches(
    batches: TokenBatches, train: LMTrainConfig, seed: int, epoch: int
) -> Iterator[Int[Tensor, "batch n_ctx"]]:
    """Yields the batches of one epoch, in an order of its own; the last may be short."""
    text = _windowed(batches, train)
    if text is not None:
        rng = np.random.default_rng([seed_for(seed, "lm_windows"), epoch])
        first = int(rng.integers(text.width)) if len(text.stream) >= 2 * text.width - 1 else 0
        offsets = first + text.width * rng.permutation(_n_windows(text))
        for i in range(0, len(offsets), train.batch_size):
            yield torch.from_numpy(text.at_offsets(offsets[i : i + train.batch_size]).astype(np.int64))
    elif isinstance(batches, IndexedBatches):
        order_seed = seed_for(seed, "lm_order", epoch)
        yield from IndexedBatches(batches.rows, RowOrder(seed=order_seed)).iterate(train.batch_size)
    else:
        yield from batches.iterate(train.batch_size)


def make_optimizers(model: nn.Module, train: LMTrainConfig) -> list[torch.optim.Optimizer]:
    """Returns Adam for everything, or Muon for the matrices inside the blocks and Adam for the rest."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    # Inside a list of blocks (`h.0.`, `layers.0.`): embeddings and the unembedding are no hidden matrices.
    hidden = [p for name, p in named if p.ndim == 2 and any(part.isdigit() for part in name.split("."))]
    chosen = {id(p) for p in hidden}
    rest = [p for _, p in named if id(p) not in chosen]
    if train.optimizer == "muon":
        muon = Muon(hidden, lr=train.muon_lr or train.lr, weight_decay=train.weight_decay)
        return [muon, torch.optim.AdamW(rest, lr=train.lr, betas=(0.9, 0.95), weight_decay=0.0)]
    groups = [{"params": hidden, "weight_decay": train.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [torch.optim.AdamW([g for g in groups if g["params"]], lr=train.lr)]


def train_lm(
    model: nn.Module,
    logits_of: LogitsFn,
    batches: TokenBatches,
    eval_batches: TokenBatches | None,
    train: LMTrainConfig,
    *,
    seed: int,
    log: Callable[[Mapping[str, Any]], None],
    save: Callable[[int, TrainResult], None],
) -> TrainResult:
    """Trains `model` in place and saves it through `save(epoch, result so far)`.

    Args:
        logits_of: the model as a function from tokens to logits.
        batches: one epoch; `train.n_epochs` of them are trained on.
        log: gets one line per `log_every_n_steps` optimizer steps and per evaluation.
        save: called every `save_every_n_epochs` and at the end.

    Raises:
        RunFailed: the loss is no finite number.
    """
    n_rows = n_rows_per_epoch(batches, train)
    n_tokens = None if n_rows is None else n_rows * batches.n_ctx * train.n_epochs
    updates = _Updates(model, train, n_rows)
    loss_of = _loss_function(logits_of, train.compile)
    begun = time.perf_counter()
    result = TrainResult(0, 0.0, None)
    with progress_bar(total=n_tokens, unit="tok", unit_scale=True) as bar:
        for epoch in range(1, train.n_epochs + 1):
            model.train()
            for tokens in epoch_batches(batches, train, seed, epoch - 1):
                updates.add(loss_of(tokens), len(tokens))
                bar.update(tokens.numel())
                if updates.is_log_step:
                    line = updates.log_line()
                    bar.set_postfix_str(f"loss={line['train_loss']:.3f}")
                    log({"epoch": epoch, "tokens": bar.n, **line})
            if epoch == train.n_epochs or epoch % (train.save_every_n_epochs or train.n_epochs) == 0:
                model.eval()
                ce = held_out_ce(logits_of, eval_batches, train.batch_size) if eval_batches else None
                result = TrainResult(int(bar.n), time.perf_counter() - begun, ce)
                log({"samples": updates.n_samples, "epoch": epoch, "tokens": bar.n, "eval_ce": ce})
                save(epoch, result)
    return result


class _Updates:
    """Gradients in, optimizer steps out: accumulation, schedule, clipping, and the mean loss for the log."""

    def __init__(self, model: nn.Module, train: LMTrainConfig, n_rows: int | None) -> None:
        self._train = train
        self._params = [p for p in model.parameters() if p.requires_grad]
        self._optimizers = make_optimizers(model, train)
        self._peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self._optimizers]
        self._schedule = _schedule(train, n_rows)
        self._n_batches = 0
        self._n_steps = 0
        self.n_samples = 0
        self._losses: list[float] = []
        self.is_log_step = False

    def add(self, loss: Float[Tensor, ""], n_samples: int) -> None:
        """Adds a batch's gradient and, at the end of a group, does the optimizer step."""
        self.n_samples += n_samples
        value = loss.item()
        if not math.isfinite(value):
            raise RunFailed(
                f"the loss is {value} at optimizer step {self._n_steps + 1}: lower train.lr (given: "
                f"{self._train.lr}) or set train.max_grad_norm"
            )
        (loss / self._train.n_accumulated).backward()
        self._losses.append(value)
        self._n_batches += 1
        self.is_log_step = False
        if self._n_batches % self._train.n_accumulated == 0:
            self._step()
            self.is_log_step = self._n_steps % self._train.log_every_n_steps == 0

    def log_line(self) -> dict[str, int | float]:
        """Returns samples, steps, the mean loss since the last line, and the learning rate of the last step.

        Under the keys of the paper's library, whose `train_loss` is divided by the batches per step, and ours is not.
        """
        line = {
            "samples": self.n_samples,
            "grad_updates": self._n_steps,
            "train_loss": sum(self._losses) / len(self._losses),
            "lr": self._train.lr * self._schedule.factor(self._n_steps - 1),
        }
        self._losses.clear()
        return line

    def _step(self) -> None:
        factor = self._schedule.factor(self._n_steps)
        if self._train.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self._params, self._train.max_grad_norm)
        for optimizer, peaks in zip(self._optimizers, self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._n_steps += 1


def _schedule(train: LMTrainConfig, n_rows: int | None) -> Schedule:
    n_warmup = train.warmup_samples // (train.batch_size * train.n_accumulated)
    if n_rows is None:
        if train.cooldown_fraction:
            raise UserError("train.cooldown_fraction needs data of known length: set streaming: false, or 0")
        return Schedule("linear", n_warmup, 0, None, None, 0.0)
    n_batches = math.ceil(n_rows / train.batch_size) * train.n_epochs
    n_steps = n_batches // train.n_accumulated
    return Schedule("linear", n_warmup, round(train.cooldown_fraction * n_steps), n_steps, n_steps, 0.0)


def _windowed(batches: TokenBatches, train: LMTrainConfig) -> PackedText | None:
    rows = batches.rows if isinstance(batches, IndexedBatches) else None
    return rows if train.random_windows and isinstance(rows, PackedText) else None


def _n_windows(text: PackedText) -> int:
    """Returns the rows that fit after any offset below one row's width."""
    return max(1, (len(text.stream) - text.width + 1) // text.width)


def _loss_function(logits_of: LogitsFn, is_compiled: bool) -> Callable[[Int[Tensor, "batch pos"]], Float[Tensor, ""]]:
    def loss_of(tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, ""]:
        return next_token_ce(logits_of(tokens), tokens)

    return torch.compile(loss_of, dynamic=False) if is_compiled else loss_of
