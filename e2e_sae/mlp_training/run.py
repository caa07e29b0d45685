"""What the trainings here share: the run's folder and trackers, batches, the loop, accuracy."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from e2e_sae.checkpoint.files import new_file, write_pickled
from e2e_sae.data.images import DIGITS, ImageData, Images, load_images
from e2e_sae.errors import RunFailed
from e2e_sae.log import logger
from e2e_sae.mlp_training.config import LoopConfig, MLPConfig, MLPSAEsConfig
from e2e_sae.seeds import seed_for
from e2e_sae.tracked_run import TrackedRun, tracked_run

LOG_EVERY_N_STEPS = 10
"""The paper's library's."""


class Step(NamedTuple):
    """What one batch came to."""

    loss: Float[Tensor, ""]
    """Mean over the batch, before the step."""
    details: Callable[[], dict[str, float]]
    """Computes what is logged besides the loss."""


LogitsFn = Callable[[Float[Tensor, "batch d_in"]], Float[Tensor, "batch n_classes"]]


class MLPRun:
    """A run's folder and where its log lines go."""

    def __init__(self, run: TrackedRun):
        self._run = run

    def log(self, n_samples: int, epoch: int, values: Mapping[str, float]) -> None:
        """Logs one line.

        Args:
            n_samples: images seen.
            epoch: counted from 1.
        """
        self._run.log({"samples": n_samples, "epoch": epoch, **values})

    @property
    def path(self) -> Path:
        """The folder."""
        return self._run.path

    def save_weights(self, epoch: int, state: dict[str, Tensor]) -> Path:
        """Writes `epoch_<n>.pt`, whole or not at all."""
        path = self._run.path / f"epoch_{epoch}.pt"
        copies = {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in state.items()}
        with new_file(path) as temporary:
            write_pickled(temporary, copies)
        return path


@contextmanager
def new_run(config: MLPConfig | MLPSAEsConfig) -> Iterator[MLPRun]:
    """Makes `<save_dir>/<run_name>_<time>/` with `final_config.yaml` in it, and closes the trackers at the end."""
    with tracked_run(config.train.save_dir, config.run_name, config, config.wandb_project) as run:
        yield MLPRun(run)


def open_data(source: str) -> ImageData:
    """Returns the images and says what they are."""
    data = load_images(source)
    n_train, n_valid, n_test = (len(part.labels) for part in (data.train, data.valid, data.test))
    height, width = data.height_width
    hint = "; for MNIST set data to hub, an .npz file or a folder of idx files" if source == DIGITS else ""
    logger.info(f"data: {source}, {height}x{width}, {n_train}/{n_valid}/{n_test} train/valid/test images{hint}")
    return data


def shuffled_batches(images: Images, batch_size: int, seed: int, epoch: int) -> Iterator[Images]:
    """Yields the batches of one epoch, in an order of its own."""
    generator = torch.Generator().manual_seed(seed_for(seed, "mlp_order", epoch))
    for indices in torch.randperm(len(images.labels), generator=generator).split(batch_size):
        yield Images(images.pixels[indices], images.labels[indices])


@torch.no_grad()
def accuracy(logits_of: LogitsFn, images: Images, batch_size: int = 1024) -> float:
    """Returns the share of images whose greatest logit is their label's."""
    n_right = 0
    for pixels, labels in zip(images.pixels.split(batch_size), images.labels.split(batch_size), strict=True):
        n_right += int((logits_of(pixels).argmax(-1) == labels).sum())
    return n_right / len(images.labels)


def fit(
    run: MLPRun,
    data: ImageData,
    train: LoopConfig,
    parameters: Iterable[nn.Parameter],
    step_on: Callable[[Images], Step],
    logits_of: LogitsFn,
    *,
    seed: int,
) -> None:
    """Trains `parameters` with Adam: a line every ten steps, and `valid/accuracy` after every epoch.

    Args:
        step_on: computes the loss of a batch.
        logits_of: the model, for the accuracy.

    Raises:
        RunFailed: the loss is no finite number.
    """
    optimizer = torch.optim.Adam(parameters, lr=train.learning_rate)
    n_samples = n_steps = 0
    for epoch in range(1, train.n_epochs + 1):
        for batch in shuffled_batches(data.train, train.batch_size, seed, epoch):
            step = step_on(batch)
            if not torch.isfinite(step.loss):
                raise RunFailed(
                    f"the loss is {step.loss.item()} at step {n_steps + 1}: lower train.learning_rate "
                    f"(given: {train.learning_rate})"
                )
            optimizer.zero_grad()
            step.loss.backward()
            optimizer.step()
            n_samples += len(batch.labels)
            n_steps += 1
            if n_steps % LOG_EVERY_N_STEPS == 0:
                run.log(n_samples, epoch, {"train/loss": step.loss.item(), **step.details()})
        valid = accuracy(logits_of, data.valid)
        run.log(n_samples, epoch, {"valid/accuracy": valid})
        logger.info(f"epoch {epoch} of {train.n_epochs}: valid accuracy {valid:.4f}")
