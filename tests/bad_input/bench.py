"""A working folder for mistakes: one valid config with its data and models, of which a case is a change."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import yaml
from pyarrow import parquet

from e2e_sae.base_config import deep_update
from e2e_sae.checkpoint.files import fingerprint
from tests.tiny_models import make_model_folder, random_tokens

BASE: dict[str, Any] = {
    "tlens_model_path": "gpt2",
    "device": "cpu",
    "saes": {"sae_positions": "blocks.1.hook_resid_pre", "dict_size_to_input_ratio": 2},
    "train_data": {"dataset_name": "rows.parquet", "n_ctx": 8, "holdout_fraction": 0.25},
    "n_samples": 16,
    "batch_size": 4,
    "loss": {"sparsity": {"coeff": 0.1}, "logits_kl": {"coeff": 1.0}},
    "lr": 1e-3,
    "eval_every_n_samples": 0,
    "eval_n_samples": 4,
    "save_every_n_samples": 8,
}
"""A valid config: 64 rows of 8 tokens, 48 of them to train on; checkpoints at 8 and 16 samples."""

POSITION_FILE = "blocks-1-hook_resid_pre.safetensors"


class Bench:
    """The working folder. Nothing in it may change while a mistake is refused."""

    def __init__(self, folder: Path):
        self.folder = folder
        make_model_folder(folder / "gpt2")
        make_model_folder(folder / "no_tokenizer", with_tokenizer=False)
        make_model_folder(folder / "shallow", n_layers=2)
        self._write_data(folder)
        self.config = self.write_config(folder / "config.yaml")

    def write_config(self, path: Path, changes: Mapping[str, Any] | None = None, without: str | None = None) -> Path:
        """Writes the valid config with changes, or without one dotted key, and returns its path."""
        values = deep_update(deep_update(BASE, {"save_dir": str(self.folder / "out")}), changes or {})
        if without is not None:
            *parents, leaf = without.split(".")
            holder = values = json.loads(json.dumps(values))
            for parent in parents:
                holder = holder[parent]
            del holder[leaf]
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    def sets(self, overrides: list[str]) -> list[str]:
        """Returns the command line's arguments for dotted overrides; `FOLDER` stands for the working folder."""
        return [a for o in overrides for a in ("--set", o.replace("FOLDER", str(self.folder)))]

    def listing(self) -> dict[str, int]:
        """Returns the size of every file (-1: a folder), by relative path."""
        return {
            str(p.relative_to(self.folder)): p.stat().st_size if p.is_file() else -1 for p in self.folder.rglob("*")
        }

    @staticmethod
    def _write_data(folder: Path) -> None:
        def table(name: str, **columns: Any) -> None:
            parquet.write_table(pa.table(columns), folder / name)

        table("rows.parquet", input_ids=random_tokens(64, 8).tolist(), number=list(range(64)))
        table("other_vocabulary.parquet", input_ids=[[49] * 8, [50] * 8] * 8)
        table("negative.parquet", input_ids=[[-1] * 8] * 8)
        table("ragged.parquet", input_ids=[[1] * 8, [1] * 7] * 8)
        table("no_rows.parquet", input_ids=pa.array([], pa.list_(pa.int64())))
        table("fractions.parquet", input_ids=[[0.5] * 8] * 8)
        table("text.parquet", text=["hello world"] * 8)
        (folder / "text.txt").write_text("hello world " * 50)
        (folder / "empty.txt").write_text("")
        (folder / "short.txt").write_text("abc")
        (folder / "latin1.txt").write_bytes("hällo".encode("latin-1"))
        (folder / "broken.jsonl").write_text('{"input_ids": [1, 2\n')
        (folder / "junk.parquet").write_bytes(b"no parquet")
        (folder / "table.csv").write_text("a,b\n")
        (folder / "odd.u16").write_bytes(b"\0" * 9)
        (folder / "zeros.u16").write_bytes(b"\0" * 128)
        (folder / "a_file").write_text("x")
        (folder / "empty_folder").mkdir()
        mixed = folder / "mixed"
        mixed.mkdir()
        (mixed / "a.txt").write_text("x")
        (mixed / "b.jsonl").write_text("{}\n")


class RunsCode:
    """Pickles to a call that makes a marker file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.marker}'",)


def copy_run(run: Path, folder: Path, finished: bool = True) -> Path:
    """Returns a copy of a run folder that may be damaged; unfinished: as if killed after its last checkpoint."""
    copy = folder / "run"
    shutil.copytree(run, copy)
    if not finished:
        (copy / "summary.json").unlink()
    return copy


def checkpoints(run: Path) -> list[Path]:
    """Returns the checkpoint folders of a run."""
    return sorted(run.glob("samples_*"))


def change_checkpoint_json(run: Path, **values: Any) -> None:
    """Changes fields of each `checkpoint.json`."""
    for checkpoint in checkpoints(run):
        path = checkpoint / "checkpoint.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def renew_check_sums(run: Path) -> None:
    """Makes the recorded check sums fit the files again, so that later checks are what finds the damage."""
    for checkpoint in checkpoints(run):
        path = checkpoint / "checkpoint.json"
        values = json.loads(path.read_text())
        values["files"] = {name: fingerprint(checkpoint / name) for name in values["files"]}
        path.write_text(json.dumps(values))


def legacy_saes(d_in: int = 16, d_sae: int = 32) -> dict[str, torch.Tensor]:
    """Returns the state dict that the paper's library would save for the valid config."""
    tensors = {
        "encoder.0.weight": torch.ones(d_sae, d_in),
        "encoder.0.bias": torch.ones(d_sae),
        "decoder.weight": torch.ones(d_in, d_sae),
        "decoder.bias": torch.ones(d_in),
    }
    return {f"blocks-1-hook_resid_pre.{name}": tensor for name, tensor in tensors.items()}
