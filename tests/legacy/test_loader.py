"""`e2e_sae.loader`, and the config class of custom models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from e2e_sae import SAETransformer
from e2e_sae.errors import UserError
from tests.legacy.by_hand import P, Q
from tests.tiny_models import random_tokens


def test_pretrained_saes_are_copied_and_only_the_others_are_left_to_train(
    model: SAETransformer, lm: Any, tmp_path: Path
):
    from e2e_sae.loader import load_pretrained_saes

    first, second = (SAETransformer(lm, [P, Q], 2.0, seed=seed).saes for seed in (5, 6))
    key, other = "blocks-1-hook_resid_pre", "blocks-2-hook_mlp_out"
    torch.save(nn.ModuleDict({key: first[key]}).state_dict(), tmp_path / "first.pth")
    torch.save(second.state_dict(), tmp_path / "both.pt")
    names = [name for name, _ in model.saes.named_parameters()]
    paths = [tmp_path / "first.pth"]
    assert load_pretrained_saes(model.saes, paths, names, retrain_saes=True) == names
    left = load_pretrained_saes(model.saes, paths, names, retrain_saes=False)
    assert left == [name for name in names if name.startswith(other)]
    encoder = f"{key}.encoder.0.weight"
    assert torch.equal(model.saes.state_dict()[encoder], first.state_dict()[encoder])
    legacy_names = list(model.saes.state_dict())
    assert load_pretrained_saes(model.saes, paths, legacy_names, False) == [n for n in legacy_names if other in n]
    assert load_pretrained_saes(model.saes, [*paths, tmp_path / "both.pt"], names, False) == []
    assert torch.equal(model.saes.state_dict()[encoder], second.state_dict()[encoder]), "the later file wins"


def test_a_file_with_more_saes_than_the_model_is_no_error(lm: Any, tmp_path: Path):
    from e2e_sae.loader import load_pretrained_saes

    both, one = SAETransformer(lm, [P, Q], 2.0, seed=0), SAETransformer(lm, [P], 2.0, seed=1)
    torch.save(both.saes.state_dict(), tmp_path / "both.pt")
    load_pretrained_saes(one.saes, [tmp_path / "both.pt"], [], retrain_saes=False)
    assert torch.equal(one.saes_at([P])[one.positions[0]].W_dec, both.saes_at([P])[both.positions[0]].W_dec)


def test_a_language_model_loads_by_path_given_as_text_too(tiny_folder: Callable[[str], Path], lm: Any):
    from e2e_sae.loader import load_tlens_model

    loaded: Any = load_tlens_model(tlens_model_name=None, tlens_model_path=str(tiny_folder("gpt2")))
    tokens = random_tokens(1, 8).to(loaded.cfg.device)
    torch.testing.assert_close(loaded(tokens, return_type="logits").cpu(), lm(tokens.cpu(), return_type="logits"))
    with pytest.raises(UserError, match="exactly one of 'tlens_model_name' and 'tlens_model_path'"):
        load_tlens_model(None, None)


def test_the_config_class_of_custom_models_is_one():
    from e2e_sae.scripts.train_tlens.run_train_tlens import Config, HookedTransformerPreConfig

    shape = {"d_model": 4, "n_layers": 2, "n_ctx": 8, "d_head": 4, "d_vocab": 50, "act_fn": "gelu"}
    fields = {**shape, "dtype": "float32", "tokenizer_name": "gpt2"}
    pre = HookedTransformerPreConfig(**fields)
    assert pre.dtype == torch.float32
    config = Config(
        name="tiny",
        tlens_config=pre,
        train={"n_epochs": 1, "batch_size": 2, "lr": "1e-3", "save_every_n_epochs": None},
        wandb_project=None,
    )
    assert config.tlens_config == fields
