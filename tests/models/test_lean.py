"""Loading keeps no second copy of the weights, and gives the same model to the last bit."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from e2e_sae.models import lean, lm
from e2e_sae.models.lm_config import LMConfig, ProcessingConfig
from e2e_sae.models.tlens import has_hooked_transformer
from tests.tiny_models import random_tokens

CLASSES: list[Any] = ["hooked", "bridge"] if has_hooked_transformer() else ["bridge"]
OFF = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False)
PROCESSINGS = {
    "default": ProcessingConfig(),
    "raw": ProcessingConfig(**OFF),
    **{f"only {option}": ProcessingConfig(**{**OFF, option: True}) for option in OFF},
    "refactored": ProcessingConfig(refactor_factored_attn_matrices=True),
}


def load(folder: Path, model_class: Any, processing: ProcessingConfig) -> Any:
    return lm.load_lm(LMConfig(tlens_model_path=folder, tlens_model_class=model_class, processing=processing))


def activations(model: Any, names: list[str]) -> list[Tensor]:
    """The logits, and the activations at some hook points."""
    seen: list[Tensor] = []
    with torch.no_grad(), model.hooks(fwd_hooks=[(name, lambda x, hook: seen.append(x.clone())) for name in names]):
        logits = model(random_tokens(2))
    return [logits, *seen]


@pytest.mark.parametrize("model_class", CLASSES)
@pytest.mark.parametrize(
    ("family", "processing"),
    [*(("gpt2", name) for name in PROCESSINGS), *((f, name) for f in ("llama", "neox") for name in ("default", "raw"))],
)
def test_a_lean_load_gives_the_same_weights_and_activations_bit_for_bit(
    tiny_folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    processing: str,
    model_class: Any,
):
    folder = tiny_folder(family)
    ours = load(folder, model_class, PROCESSINGS[processing])
    for name in ("own_memory_", "settle_"):
        monkeypatch.setattr(lm, name, lambda model: None)
    monkeypatch.setattr(lm, "lazy_copies", nullcontext)
    plain = load(folder, model_class, PROCESSINGS[processing])
    expected = plain.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    assert [name for name, weight in ours.state_dict().items() if not torch.equal(weight, expected[name])] == []
    names = ["blocks.0.hook_resid_pre", "blocks.1.attn.hook_z", "blocks.1.hook_mlp_out", "blocks.2.hook_resid_post"]
    for ours_at, plain_at in zip(activations(ours, names), activations(plain, names), strict=True):
        assert torch.equal(ours_at, plain_at)


@pytest.mark.parametrize("model_class", CLASSES)
@pytest.mark.parametrize("processing", [ProcessingConfig(), PROCESSINGS["raw"]], ids=["processed", "raw"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "neox"])
def test_no_weight_is_kept_twice(
    tiny_folder: Callable[[str], Path], family: str, processing: ProcessingConfig, model_class: Any
):
    model = load(tiny_folder(family), model_class, processing)
    d, hidden, n_layers, d_vocab, n_ctx = 16, {"gpt2": 64}.get(family, 32), 3, 50, 16
    storages = [p.untyped_storage() for p in model.parameters() if p.numel() >= d * d // 2]  # no biases, no norms
    held = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    kv = d // 2 if family == "llama" else d  # one of two heads
    blocks = n_layers * (2 * d * d + 2 * d * kv + (3 if family == "llama" else 2) * d * hidden)
    is_tied = family == "gpt2" and processing.is_raw and model_class == "bridge"
    ends = (1 if is_tied else 2) * d * d_vocab + (n_ctx * d if family == "gpt2" else 0)
    assert held == 4 * (blocks + ends)


def test_joint_weights_are_gone_where_they_are_stale_and_stay_where_the_three_are_views_of_them(
    tiny_folder: Callable[[str], Path],
):
    processed, raw = (load(tiny_folder("gpt2"), "bridge", PROCESSINGS[name]) for name in ("default", "raw"))
    for block in processed.blocks:
        joint = block.attn.qkv.original_component
        assert joint.weight is None
        assert joint.bias is None
        with pytest.raises((AttributeError, TypeError)):
            block.attn.qkv(torch.zeros(1, 2, 16))
    for block in raw.blocks:
        joint = block.attn.qkv.original_component.weight
        assert torch.equal(joint[:, :16].T, block.attn.q.weight)
    assert "c_attn" not in " ".join(dict(processed.named_parameters()))


def test_a_processed_bridge_moves_casts_and_takes_its_own_weights_back(tiny_folder: Callable[[str], Path]):
    model = load(tiny_folder("gpt2"), "bridge", ProcessingConfig())
    before = activations(model, [])[0]
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    assert torch.equal(activations(model, [])[0], before)
    lm.move_lm(model, dtype=torch.float64)
    torch.testing.assert_close(activations(model, [])[0].float(), before, atol=1e-5, rtol=0)


def test_lazy_copies_behave_as_copies(monkeypatch: pytest.MonkeyPatch):
    a = torch.arange(6.0)
    with lean.lazy_copies():
        b, c = a.clone(), a.clone()
        assert torch._C._is_cow_tensor(b)  # pyright: ignore[reportAttributeAccessIssue]
        b += 1
        a[0] = 10
    c[1] = -1
    assert a.tolist() == [10, 1, 2, 3, 4, 5]
    assert b.tolist() == [1, 2, 3, 4, 5, 6]
    assert c.tolist() == [0, -1, 2, 3, 4, 5]
    assert not torch._C._is_cow_tensor(a.clone())  # pyright: ignore[reportAttributeAccessIssue]


def test_what_cannot_be_copied_lazily_is_copied(tmp_path: Path):
    path = tmp_path / "numbers"
    path.write_bytes(torch.arange(4.0).numpy().tobytes())
    mapped = torch.from_file(str(path), shared=True, size=4)
    with lean.lazy_copies():
        copy = mapped.clone()
    copy[0] = 7
    assert mapped.tolist() == [0, 1, 2, 3]
    assert copy.tolist() == [7, 1, 2, 3]


def test_settled_weights_share_nothing_and_owned_ones_lie_in_memory():
    model = nn.Linear(3, 2)
    with lean.lazy_copies():
        twin = nn.Linear(3, 2)
        twin.weight.data = model.weight.data.clone()
    lean.settle_(twin)
    lean.settle_(model)
    assert not torch._C._is_cow_tensor(twin.weight.data)  # pyright: ignore[reportAttributeAccessIssue]
    assert twin.weight.data_ptr() != model.weight.data_ptr()
    place, values = model.weight.data_ptr(), model.weight.detach().tolist()
    lean.own_memory_(model)
    assert model.weight.data_ptr() != place
    assert model.weight.tolist() == values
