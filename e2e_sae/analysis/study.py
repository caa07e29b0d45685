"""Runs under study: their table, their SAEs in their language model, rows of their evaluation data, a cache.

Everything an analysis needs of a run comes from here, so that a language model is loaded once for all the runs that
share it, and what took long to compute is computed once.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from e2e_sae.acts import TokenBatch
from e2e_sae.base_config import apply_overrides
from e2e_sae.checkpoint import load_run
from e2e_sae.checkpoint.files import fingerprint, read_tensors, write_tensors
from e2e_sae.checkpoint.records import StoredRun
from e2e_sae.checkpoint.run_dir import CONFIG_FILE
from e2e_sae.checkpoint.sources import fetch_wandb_run
from e2e_sae.config import Config
from e2e_sae.data.batches import TokenBatches
from e2e_sae.errors import UserError
from e2e_sae.evaluate import token_batches
from e2e_sae.models.lm import load_lm
from e2e_sae.models.lm_config import LMConfig
from e2e_sae.models.sae_transformer import SAETransformer
from e2e_sae.models.stored import lm_config_of
from e2e_sae.progress import progress_bar
from e2e_sae.setup import load_eval_batches


class Study:
    """Runs, and what analyses ask of them."""

    def __init__(
        self,
        table: Any,
        cache: Path,
        *,
        n_samples: int = 100,
        batch_size: int = 8,
        device: str = "auto",
        seed: int = 0,
        overrides: Sequence[str] = (),
    ):
        """
        Args:
            table: pandas, one row for each run and position, as `runs.runs_table` makes it.
            cache: folder of what was computed before; made when it is needed.
            n_samples: rows of evaluation data that activations are looked at on (the paper: 100).
            batch_size: rows at a time.
            device: where models run; `auto`: CUDA if there is one.
            seed: of everything that is drawn at random (bootstrap, resampling, UMAP).
            overrides: changes of every run's config, e.g. `tlens_model_path=...` or `eval_data.dataset_name=...`.
        """
        self.table = table
        self.cache = cache
        self.n_samples = n_samples
        self.batch_size = batch_size
        self.device = device
        self.seed = seed
        self._overrides = list(overrides)
        self._lm: tuple[LMConfig, nn.Module] | None = None
        self._fingerprints: dict[str, str] = {}
        self._content_of = functools.cache(_content)

    @cached_property
    def sources(self) -> dict[str, str]:
        """Where each run is, by its id: a folder, or `entity/project/run_id`."""
        return dict(zip(self.table["id"], self.table["source"], strict=True))

    def stored(self, run_id: str) -> StoredRun:
        """Returns a run as it is stored: its config and the tensors of its newest checkpoint.

        Raises:
            UserError: there is none.
        """
        source = self.sources[run_id]
        path = Path(source)
        return load_run(path if path.exists() else fetch_wandb_run(source))

    def config(self, run: StoredRun) -> Config:
        """Returns a run's config, with the study's overrides.

        Raises:
            UserError: it has none, or the overrides do not fit.
        """
        if not run.config:
            raise UserError(f"'{run.source}' has no {CONFIG_FILE} beside it: it says which data to look at")
        return Config.from_dict(apply_overrides(run.config, self._overrides), base_dir=run.source.parent)

    def lm_config(self, run: StoredRun) -> LMConfig:
        """Returns which language model a run belongs to, with the study's overrides."""
        moved = any(override.startswith(("tlens_", "dtype")) for override in self._overrides)
        return self.config(run).lm if moved else lm_config_of(run)

    def lm_key(self, run: StoredRun) -> dict[str, Any]:
        """Returns what tells a run's language model from others: a local one by its files, wherever they lie."""
        key = self.lm_config(run).to_dict()
        path = key["tlens_model_path"] and Path(key["tlens_model_path"])
        if path and path.exists():
            key["tlens_model_path"] = self._content_of(path)
        return key

    def lm(self, run: StoredRun) -> nn.Module:
        """Returns a run's language model; the latest one is kept."""
        wanted = self.lm_config(run)
        if self._lm is None or self._lm[0] != wanted:
            self._lm = None  # two need not fit into memory
            self._lm = (wanted, load_lm(wanted, self.device))
        return self._lm[1]

    def open(self, run_id: str) -> SAETransformer:
        """Returns a run's SAEs in its language model, in eval mode."""
        run = self.stored(run_id)
        return SAETransformer.from_run(run, self.lm(run)).eval()

    def rows(self, run_id: str) -> TokenBatches:
        """Returns the token rows that a run is evaluated on.

        Raises:
            UserError: its config names none.
        """
        run = self.stored(run_id)
        batches = load_eval_batches(self.config(run), self.lm(run))
        if batches is None:
            raise UserError(
                f"'{run.source}' has no evaluation data: name some with --set eval_data.dataset_name=... (or "
                "--set train_data.holdout_fraction=...)"
            )
        return batches

    def batches(self, run_id: str, n_samples: int | None = None, desc: str = "activations") -> Iterator[TokenBatch]:
        """Yields batches of a run's evaluation data on the model's device, with a progress bar.

        Args:
            run_id: the run.
            n_samples: rows in all; None: the study's. Fewer if there are no more.
            desc: what the bar says.
        """
        run = self.stored(run_id)
        config, lm, rows = self.config(run), self.lm(run), self.rows(run_id)
        n = min(n_samples or self.n_samples, rows.n_samples or 2**62)
        exclude = (config.eval_data or config.train_data).exclude_token_ids
        device = next(lm.parameters()).device
        batches = token_batches(rows, min(self.batch_size, n), n, exclude, device)
        yield from progress_bar(batches, total=-(-n // self.batch_size), desc=desc, inner=True)

    def cached(
        self, name: str, key: Mapping[str, Any], compute: Callable[[], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Returns tensors that were computed before with an equal key, or computes and keeps them.

        Args:
            name: of the computation.
            key: all that the result depends on (JSON): run ids with `fingerprint`, numbers of rows, seeds.
            compute: returns named tensors.
        """
        digest = hashlib.sha256(json.dumps([name, key], sort_keys=True).encode()).hexdigest()[:16]
        file = self.cache / f"{name}_{digest}.safetensors"
        if file.is_file():
            return read_tensors(file)
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in compute().items()}
        self.cache.mkdir(parents=True, exist_ok=True)
        write_tensors(file, tensors)
        return tensors

    def fingerprint(self, run_id: str) -> str:
        """Returns a text that changes when the run's SAEs do: from the content of their tensors, read once."""
        if run_id not in self._fingerprints:
            self._fingerprints[run_id] = self._digest(run_id)
        return self._fingerprints[run_id]

    def _digest(self, run_id: str) -> str:
        saes = self.stored(run_id).saes
        return digest_of({f"{name}/{key}": tensor for name, sae in saes.items() for key, tensor in sae.tensors.items()})


def _content(path: Path) -> dict[str, dict[str, int]]:
    """Returns size and CRC-32 of a file, or of those in a folder, by name."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return {file.relative_to(path).as_posix(): fingerprint(file) for file in files}


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Returns a text that changes when the names, the shapes or the content of tensors do."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}/{tensor.dtype}/{list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
