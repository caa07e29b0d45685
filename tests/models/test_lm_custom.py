"""Custom TransformerLens models: legacy `.pt` files compute what their tensors say, or are refused with a reason."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from e2e_sae.errors import CheckpointError, MissingFileError, UserError
from e2e_sae.models import lm, lm_custom
from e2e_sae.models.lm_config import LMConfig
from e2e_sae.models.tlens import has_hooked_transformer, quietly
from e2e_sae.models.tokenizers import require_tokenizer
from tests.tiny_models import Bomb

CLASSES: list[Any] = ["hooked", "bridge"] if has_hooked_transformer() else ["bridge"]
AUTO: Any = CLASSES[0]


def load(path: Path) -> nn.Module:
    return lm.load_lm(LMConfig(tlens_model_path=path))


TINY_CONFIG = {
    "d_model": 8, "n_layers": 1, "n_ctx": 6, "d_head": 4, "d_vocab": 11, "act_fn": "relu", "dtype": "float32",
    "tokenizer_name": "nobody/no-such-tokenizer",
}  # fmt: skip


def legacy_file(folder: Path, **changes: Any) -> Path:
    """Writes a legacy model with random weights in HookedTransformer's own names and shapes."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(0)
    heads, d_model, d_head, d_mlp = 2, 8, 4, 32
    shapes = {
        "embed.W_E": (11, d_model), "pos_embed.W_pos": (6, d_model),
        "blocks.0.ln1.w": (d_model,), "blocks.0.ln1.b": (d_model,),
        "blocks.0.ln2.w": (d_model,), "blocks.0.ln2.b": (d_model,),
        "blocks.0.attn.W_O": (heads, d_head, d_model), "blocks.0.attn.b_O": (d_model,),
        "blocks.0.mlp.W_in": (d_model, d_mlp), "blocks.0.mlp.b_in": (d_mlp,),
        "blocks.0.mlp.W_out": (d_mlp, d_model), "blocks.0.mlp.b_out": (d_model,),
        "ln_final.w": (d_model,), "ln_final.b": (d_model,),
        "unembed.W_U": (d_model, 11), "unembed.b_U": (11,),
    }  # fmt: skip
    for letter in "QKV":
        shapes[f"blocks.0.attn.W_{letter}"] = (heads, d_model, d_head)
        shapes[f"blocks.0.attn.b_{letter}"] = (heads, d_head)
    tensors = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    tensors["blocks.0.attn.mask"] = torch.ones(6, 6, dtype=torch.bool).tril()
    tensors["blocks.0.attn.IGNORE"] = torch.tensor(-torch.inf)
    tensors = {name: value for name, value in (tensors | changes).items() if value is not None}
    torch.save(tensors, folder / "epoch_1.pt")
    (folder / "final_config.yaml").write_text(yaml.safe_dump({"tlens_config": TINY_CONFIG}), encoding="utf-8")
    return folder / "epoch_1.pt"


def legacy_logits_by_hand(path: Path, tokens: Tensor) -> Tensor:
    """One pre-norm transformer block, written out."""
    w = torch.load(path, weights_only=True)

    def norm(x: Tensor, name: str) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], w[f"{name}.w"], w[f"{name}.b"], eps=1e-5)

    x = w["embed.W_E"][tokens] + w["pos_embed.W_pos"][: tokens.shape[1]]
    h = norm(x, "blocks.0.ln1")
    a = "blocks.0.attn."
    q, k, v = (torch.einsum("btd,hde->bhte", h, w[f"{a}W_{n}"]) + w[f"{a}b_{n}"][:, None] for n in "QKV")
    z = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + torch.einsum("bhte,hed->btd", z, w[f"{a}W_O"]) + w[f"{a}b_O"]
    m = "blocks.0.mlp."
    x = x + (norm(x, "blocks.0.ln2") @ w[f"{m}W_in"] + w[f"{m}b_in"]).relu() @ w[f"{m}W_out"] + w[f"{m}b_out"]
    return norm(x, "ln_final") @ w["unembed.W_U"] + w["unembed.b_U"]


def legacy_classes() -> list[Any]:
    return ["hooked"] if has_hooked_transformer() else ["bridge"]


@pytest.mark.parametrize("model_class", legacy_classes())
def test_a_legacy_file_computes_what_its_tensors_say(tmp_path: Path, model_class: Any):
    path = legacy_file(tmp_path)
    model: Any = lm.load_lm(LMConfig(tlens_model_path=path, tlens_model_class=model_class))
    tokens = torch.tensor([[1, 5, 0, 10, 3]])
    torch.testing.assert_close(model(tokens), legacy_logits_by_hand(path, tokens), atol=1e-4, rtol=1e-5)
    assert lm.model_facts(model)[:4] == (1, 8, 11, 6)
    assert model.tokenizer is None
    with pytest.raises(UserError, match="tokenizer 'nobody/no-such-tokenizer' cannot be found"):
        require_tokenizer(model)


def test_the_golden_model_reproduces_the_papers_logits(shared: Path, tmp_path: Path):
    golden = shared / "golden"
    for name in ("epoch_1.pt", "final_config.yaml"):
        shutil.copy(golden / "lm" / name, tmp_path)
    config = (tmp_path / "final_config.yaml").read_text(encoding="utf-8")
    filled = config.replace("TOKENIZER_DIR", str(golden / "tokenizer"))
    (tmp_path / "final_config.yaml").write_text(filled, encoding="utf-8")
    model: Any = lm.load_lm(LMConfig(tlens_model_path=tmp_path / "epoch_1.pt"))
    tokens = load_file(golden / "tokens.safetensors")["eval"][-6:].long()
    expected = load_file(golden / "local" / "last_eval_batch_logits.safetensors")["orig_logits"]
    torch.testing.assert_close(model(tokens), expected, atol=1e-4, rtol=0)
    assert len(require_tokenizer(model)) == 65


def test_a_legacy_file_needs_its_config(tmp_path: Path):
    path = legacy_file(tmp_path)
    config = tmp_path / "final_config.yaml"
    config.write_text("tlens_config: {d_model: 8, n_layers: 1}", encoding="utf-8")
    with pytest.raises(UserError, match="tlens_config lacks n_ctx, d_head, d_vocab, act_fn"):
        load(path)
    config.write_text("a: 1", encoding="utf-8")
    with pytest.raises(UserError, match="has no 'tlens_config' block"):
        load(path)
    config.unlink()
    with pytest.raises(MissingFileError, match=r"needs the final_config.yaml it was saved with"):
        load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unembed.W_U": None}, "unembed.* is missing"),
        ({"blocks.0.attn.W_Q": torch.zeros(4, 8, 2)}, r"blocks\.0\.attn"),
        ({"embed.W_E": torch.zeros(12, 8)}, r"embed\.\w+ is \[12, 8\], expected \[11, 8\]"),
        ({"blocks.1.ln1.w": torch.zeros(8)}, r"blocks\.1\.ln1\.\w+ is not part of the model"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_named(tmp_path: Path, changes: dict[str, Any], message: str):
    with pytest.raises(CheckpointError, match=f"does not fit the tlens_config.*{message}"):
        load(legacy_file(tmp_path, **changes))


def test_unsafe_and_damaged_files_are_refused(tmp_path: Path):
    path = legacy_file(tmp_path)
    whole = path.read_bytes()
    torch.save({"embed.W_E": Bomb(tmp_path / "exploded")}, path)
    with pytest.raises(CheckpointError, match=r"epoch_1.pt' holds pickled code besides tensors and was refused"):
        load(path)
    path.write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(CheckpointError, match=r"epoch_1\.pt"):
        load(path)
    assert not (tmp_path / "exploded").exists()
    for damaged in (whole[: len(whole) // 2], b"", b"not a checkpoint"):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"epoch_1.pt' is damaged, or no torch file"):
            load(path)
    torch.save([torch.zeros(2)], path)
    with pytest.raises(CheckpointError, match="holds no state dict"):
        load(path)


@pytest.mark.skipif(not has_hooked_transformer(), reason="a bridge is the default on TransformerLens 4")
def test_a_legacy_file_as_a_bridge_on_tlens_3_says_what_to_do(tmp_path: Path):
    with pytest.raises(UserError, match="set tlens_model_class to 'auto'"):
        lm.load_lm(LMConfig(tlens_model_path=legacy_file(tmp_path), tlens_model_class="bridge"))


@pytest.mark.parametrize("model_class", legacy_classes())
def test_custom_models_are_built_trainable(model_class: Any):
    with quietly():
        model = lm_custom.build_custom_lm(TINY_CONFIG, model_class)
    loss = model(torch.tensor([[1, 2, 3]])).pow(2).mean()
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    with quietly(), pytest.raises(UserError, match="refuses the tlens_config"):
        lm_custom.build_custom_lm(TINY_CONFIG | {"act_fn": "no_such_function"}, model_class)


# --- the config
