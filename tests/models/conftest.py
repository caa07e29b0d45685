from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from e2e_sae.models.lm import load_lm
from e2e_sae.models.lm_config import LMConfig


@pytest.fixture(scope="module")
def lm_of(tiny_folder: Callable[[str], Path]) -> Callable[[str], Any]:
    """Returns the tiny model of a family in float32, the same each time."""
    loaded: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in loaded:
            loaded[family] = load_lm(LMConfig(tlens_model_path=tiny_folder(family)))
        return loaded[family]

    return get
