"""A tiny model with two SAEs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from e2e_sae import SAETransformer
from e2e_sae.models.lm import load_lm
from e2e_sae.models.lm_config import LMConfig
from tests.legacy.by_hand import P, Q


@pytest.fixture(scope="session")
def lm(tiny_folder: Callable[[str], Path]) -> Any:
    """A random GPT-2 of three blocks."""
    return load_lm(LMConfig(tlens_model_path=tiny_folder("gpt2")))


@pytest.fixture
def model(lm: Any) -> SAETransformer:
    """It, with SAEs at P and Q."""
    return SAETransformer(lm, [P, Q], dict_size_to_input_ratio=2.0, seed=0)
