"""Fused blocks against TransformerLens' own, in value and gradient."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from e2e_sae.models.fast_blocks import can_fuse, fast_blocks
from e2e_sae.models.head import run_to_unembedding
from e2e_sae.models.lm import is_bridge, load_lm
from e2e_sae.models.lm_config import LMConfig, ProcessingConfig
from e2e_sae.models.splicing import splice
from tests.tiny_models import FAMILIES, random_tokens
from tests.tiny_runs import console

RAW = ProcessingConfig(fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False)


def load(folder: Path, processing: ProcessingConfig | None = None) -> Any:
    return load_lm(LMConfig(tlens_model_path=folder, dtype="float64", processing=processing or ProcessingConfig()))


def scaled_run(model: Any, fused: bool, inner: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what enters the unembedding, and its gradient with respect to a scale at the input of block 1."""
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    functions: list[Any] = [("blocks.1.hook_resid_pre", lambda x: x * scale)]
    if inner is not None:
        functions.append((inner, lambda x: x * 0.5))
    with splice(model, functions):
        if fused:
            with fast_blocks(model):
                hidden = run_to_unembedding(model, random_tokens(2, 8))
        else:
            hidden = run_to_unembedding(model, random_tokens(2, 8))
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1), dtype=hidden.dtype)
    (gradient,) = torch.autograd.grad((hidden * weights).sum(), scale)
    return hidden, gradient


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("processing", [None, RAW], ids=["processed", "raw"])
@pytest.mark.parametrize("inner", [None, "blocks.2.hook_mlp_out"])
def test_fused_blocks_equal_the_models_own_in_value_and_gradient(
    family: str, processing: ProcessingConfig | None, inner: str | None, tiny_folder: Callable[[str], Path]
) -> None:
    model = load(tiny_folder(family), processing)
    expected = scaled_run(model, fused=False, inner=inner)
    assert can_fuse(model)
    # On a bridge, transformers' own Llama computes its norms and its softmax in float32.
    exact = not (family == "llama" and is_bridge(model))
    tolerance: dict[str, Any] = {} if exact else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(scaled_run(model, fused=True, inner=inner), expected, **tolerance)
    torch.testing.assert_close(scaled_run(model, fused=False, inner=inner), expected)


def test_only_blocks_that_nobody_listens_inside_are_fused(tiny_folder: Callable[[str], Path]) -> None:
    model = load(tiny_folder("gpt2"))
    assert can_fuse(model)

    def fused() -> list[int]:
        with fast_blocks(model):
            return [i for i, block in enumerate(model.blocks) if "forward" in block.__dict__]

    assert fused() == [0, 1, 2]
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", lambda x, hook: None)]):
        assert fused() == [0, 2]
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", lambda x, hook: None)]):
        assert fused() == [0, 1, 2]
    assert [block for block in model.blocks if "forward" in block.__dict__] == []


def test_a_model_with_blocks_of_its_own_runs_as_it_is_and_says_so(tiny_folder: Callable[[str], Path]) -> None:
    model = load(tiny_folder("gpt2"))
    mlp = model.blocks[1].mlp
    with mlp.register_forward_hook(lambda module, inputs, output: output * 2), console() as said:
        assert not can_fuse(model)
        assert not can_fuse(model)
    assert len(said) == 1
    assert "runs without fused kernels" in said[0]


def test_a_soft_cap_on_the_scores_is_not_fused(tiny_folder: Callable[[str], Path]) -> None:
    model = load(tiny_folder("gpt2"))
    model.cfg.attn_scores_soft_cap = 5.0
    assert not can_fuse(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_first_looked_at_in_inference_mode_still_gives_gradients(
    family: str, tiny_folder: Callable[[str], Path]
) -> None:
    model = load(tiny_folder(family))
    with torch.inference_mode():
        assert can_fuse(model)
    for fused in (True, False):
        assert scaled_run(model, fused=fused)[1].isfinite()
