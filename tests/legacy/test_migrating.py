"""The Python of docs/migrating.md runs on a run in the paper's library's format."""

import re
from pathlib import Path
from typing import Any

import torch

from e2e_sae import SAETransformer
from e2e_sae.settings import REPO_ROOT
from e2e_sae.utils import save_module
from tests.legacy.by_hand import P, Q
from tests.tiny_models import D_MODEL, random_tokens

DOCUMENT = REPO_ROOT / "docs" / "migrating.md"


def test_the_first_python_block_runs(model: SAETransformer, tiny_folder: Any, tmp_path: Path):
    config = {"tlens_model_path": str(tiny_folder("gpt2")), "saes": {"sae_positions": [P, Q]}}
    save_module(config, tmp_path / "run", model.saes, "samples_8.pt")
    block = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)[0]
    code = block.replace("path/to/old_run", str(tmp_path / "run")).replace("blocks.6", "blocks.1")
    names: dict[str, Any] = {"tokens": random_tokens(2, 8)}
    exec(code.replace("blocks-6", "blocks-1"), names)
    key = "blocks-1-hook_resid_pre"
    assert torch.equal(names["state"][f"{key}.decoder.weight"].cpu(), model.saes.state_dict()[f"{key}.decoder.weight"])
    assert names["dictionary"].shape == (D_MODEL, 2 * D_MODEL)
    assert torch.equal(names["latents"], names["acts"][P].latents)
    assert not torch.allclose(names["logits"], names["clean_logits"])


def test_every_python_block_names_methods_that_exist():
    text = DOCUMENT.read_text(encoding="utf-8")
    methods = set(re.findall(r"SAETransformer\.(\w+)", text))
    assert {"from_local_path", "from_wandb", "from_hub"} <= methods
    assert all(hasattr(SAETransformer, name) for name in methods)
