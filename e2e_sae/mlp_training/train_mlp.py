"""Trains an MLP to classify images: cross-entropy, Adam."""

from pathlib import Path

import torch
import torch.nn.functional as F

from e2e_sae.data.images import Images
from e2e_sae.log import logger
from e2e_sae.mlp_training.config import MLPConfig
from e2e_sae.mlp_training.run import Step, accuracy, fit, new_run, open_data
from e2e_sae.models.mlp import MLP
from e2e_sae.seeds import seed_for


def train_mlp(config: MLPConfig) -> Path:
    """Trains the MLP and returns the run folder: `final_config.yaml`, `metrics.jsonl`, `epoch_<n>.pt`.

    Logs `train/loss` every ten steps and `valid/accuracy` after every epoch; `test/accuracy` at the end.

    Raises:
        UserError: the data cannot be read.
        RunFailed: the loss is no finite number.
    """
    data, train = open_data(config.data), config.train
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(config.seed, "mlp_init"))
        mlp = MLP(config.model.hidden_sizes, data.d_in, data.n_classes)

    def step_on(batch: Images) -> Step:
        return Step(F.cross_entropy(mlp(batch.pixels), batch.labels), dict)

    with new_run(config) as run:
        fit(run, data, train, mlp.parameters(), step_on, mlp, seed=config.seed)
        test = accuracy(mlp, data.test)
        run.log(train.n_epochs * len(data.train.labels), train.n_epochs, {"test/accuracy": test})
        path = run.save_weights(train.n_epochs, mlp.state_dict())
    logger.info(f"test accuracy {test:.4f} -> {path}")
    return run.path
