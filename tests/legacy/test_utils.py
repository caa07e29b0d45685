"""`e2e_sae.types`, `e2e_sae.log`, and the rest of `e2e_sae.utils`."""

import json
import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import BaseModel, ValidationError
from torch import nn

from e2e_sae.base_config import BaseConfig


def test_pydantic_types_take_and_give_what_they_did():
    from e2e_sae.settings import REPO_ROOT
    from e2e_sae.types import TORCH_DTYPES, RootPath, TorchDtype

    class Settings(BaseModel):
        dtype: TorchDtype
        path: RootPath

    settings = Settings(dtype="bfloat16", path="out/x.pt")  # pyright: ignore
    assert (settings.dtype, settings.path) == (torch.bfloat16, REPO_ROOT / "out" / "x.pt")
    assert Settings(dtype=torch.float64, path=Path("/a")).model_dump() == {"dtype": torch.float64, "path": "/a"}
    assert json.loads(settings.model_dump_json())["dtype"] == "bfloat16"
    assert TORCH_DTYPES["float32"] == torch.float32
    with pytest.raises(ValidationError, match="no dtype is called 'int3'"):
        Settings(dtype="int3", path="x")  # pyright: ignore


class Inner(BaseConfig):
    coeff: float
    names: list[str] = []


class Outer(BaseConfig):
    lr: float = 1.0
    inner: Inner | None = None


def test_configs_are_loaded_and_replaced(tmp_path: Path):
    from e2e_sae.utils import load_config, replace_pydantic_model

    (tmp_path / "run.yaml").write_text("lr: 5e-4\ninner: {coeff: 3, names: [a, b]}\n")
    config = load_config(str(tmp_path / "run.yaml"), Outer)
    assert load_config(config, Outer) is config
    changed = replace_pydantic_model(config, {"inner": {"names": ["c"]}}, {"lr": "1e-3"})
    assert changed == Outer(lr=1e-3, inner=Inner(coeff=3, names=["c"]))
    assert replace_pydantic_model(config, {"inner": None}) == Outer(lr=5e-4)
    assert config.lr == 5e-4
    for path, words in [(tmp_path / "run.yml", "must end in .yaml"), (tmp_path / "no.yaml", "does not exist")]:
        with pytest.raises(AssertionError, match=words):
            load_config(path, Outer)


def test_arrays_are_made_of_what_they_were_made_of():
    from e2e_sae.utils import to_numpy

    for x in (torch.ones(2), nn.Parameter(torch.ones(2)), [1, 1], (1, 1), np.ones(2), torch.ones(2).bfloat16()):
        assert to_numpy(x).tolist() == [1, 1]
    assert to_numpy(3.5) == 3.5
    assert to_numpy("a") == "a"
    with pytest.raises(ValueError, match="a dict cannot be made a numpy array"):
        to_numpy({})


def test_a_seed_sets_all_three_generators():
    from e2e_sae.utils import set_seed

    def numbers() -> tuple[float, float, float]:
        return torch.rand(1).item(), float(np.random.rand()), random.random()

    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        set_seed(1)
        first = numbers()
        set_seed(None)
        assert numbers() != first
        set_seed(1)
        assert numbers() == first
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def test_the_logger_prints_and_keeps_warnings_and_leaves_the_root_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from e2e_sae.log import logger, setup_logger

    root, before = logging.getLogger().handlers[:], (logger.handlers[:], logger.level, logger.propagate)
    try:
        assert setup_logger(tmp_path / "logs" / "logs.log") is logger
        logger.info("progress")
        logger.warning("careful")
        assert "progress" in capsys.readouterr().out
        text = (tmp_path / "logs" / "logs.log").read_text()
        assert "careful" in text
        assert "progress" not in text
        assert logging.getLogger().handlers == root
    finally:
        for handler in logger.handlers:
            handler.close()
        logger.handlers, logger.propagate = before[0], before[2]
        logger.setLevel(before[1])


def test_without_wandb_the_config_comes_back_as_it_is(monkeypatch: pytest.MonkeyPatch):
    from e2e_sae.utils import init_wandb

    monkeypatch.setenv("WANDB_MODE", "disabled")
    config = Outer(lr=2.0)
    assert init_wandb(config, "project", sweep_config_path=None) is config
