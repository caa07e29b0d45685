"""The counted operations are those of the matrix products that a step cannot do without."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.floor import Work, block_work, matmul_rate, sae_work, step_work
from benchmarks.plain import plain_step
from benchmarks.shapes import GPT2_SMALL, Kind, Shape, gpt2_style, model_folder
from benchmarks.steps import our_step

GPT2 = gpt2_style("tiny-gpt2", 3, 32, 2, d_vocab=128, n_ctx=16, batch_size=2, layer=1, d_sae=64)
LLAMA = Shape(
    "tiny-llama", "llama", 3, 32, 4, n_kv_heads=2, d_mlp=48, d_vocab=128, n_ctx=16, batch_size=2, layer=1, d_sae=64
)


def test_a_block_is_counted_as_by_hand():
    # GPT-2: q, k, v, o of 32 x 32; MLP 32 x 128 twice. Attention: 16 tokens, of which half, for scores and for values.
    assert block_work(GPT2) == (2 * (4 * 32 * 32 + 2 * 32 * 128), 2 * (2 * 32 * 16 / 2))
    # Llama: k and v have 2 of 4 heads of 8; MLP 32 x 48 three times.
    assert block_work(LLAMA) == (2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48), 2 * (2 * 32 * 16 / 2))
    assert sae_work(GPT2) == 5 * 2 * 32 * 64


def test_members_cost_as_the_plan_says():
    # Eight local members at layer 10 with 1,536 latents: 1.5 times one; eight e2e members: 0.65 of eight alone.
    local = step_work(GPT2_SMALL._replace(layer=10, d_sae=1536), "local")
    assert local.of(8) / local.of(1) == pytest.approx(1.5, abs=0.03)
    e2e = step_work(GPT2_SMALL, "e2e")
    assert e2e.of(8) / (8 * e2e.of(1)) == pytest.approx(0.65, abs=0.005)
    assert Work(3.0, 2.0).of(4) == 11.0


def _counted(shape: Shape, kind: Kind, tmp_path: Path) -> tuple[int, int]:
    """Operations that torch counts in a step of ours, and in one of the twin's on the same model."""
    with model_folder(shape) as ready:
        ours, lm = our_step(ready, kind, tmp_path, "cpu")
    twin = plain_step(lm, shape, kind)
    totals: list[int] = []
    for step in (ours, twin):
        step()  # ours looks at the model and logs
        with FlopCounterMode(display=False) as counter:
            step()
        totals.append(counter.get_total_flops())
    return totals[0], totals[1]


@pytest.mark.parametrize("kind", ["local", "e2e", "e2e+ds"])
@pytest.mark.parametrize("shape", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_torch_counts_the_same_in_our_step_and_in_the_twins(shape: Shape, kind: Kind, tmp_path: Path):
    ours, twin = _counted(shape, kind, tmp_path)
    weights, attention = block_work(shape)
    n, d, n_blocks, n_above = shape.n_tokens, shape.d_model, shape.n_layers, shape.n_layers - shape.layer
    # Torch does not count fused attention on a CPU: once in each clean block, three times in each spliced one.
    n_attentions = shape.layer if kind == "local" else n_blocks + 3 * n_above
    expected = step_work(shape, kind).of(1) - n * n_attentions * attention
    normalisation = 2 * d * shape.d_sae  # gradient of the decoder's, per step
    assert ours == expected + normalisation
    # The twin: local runs the SAE's block too; else two full passes, and a backward through what is above the SAE.
    block, head = weights + 2 * attention, 2 * d * shape.d_vocab
    if kind == "local":
        plain = (shape.layer + 1) * block + sae_work(shape)
    else:
        plain = 2 * (n_blocks * block + head) + n_above * (weights + 4 * attention) + head + sae_work(shape)
    assert twin == n * plain


def test_the_rate_is_that_of_the_products_asked_for(monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[torch.dtype, str]] = []
    mm = torch.mm

    def spy(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        seen.append((a.dtype, torch.get_float32_matmul_precision()))
        return mm(a, b, out=out)

    monkeypatch.setattr(torch, "mm", spy)
    before = torch.get_float32_matmul_precision()
    for products, expected in {
        "float32": (torch.float32, "highest"),
        "tf32": (torch.float32, "high"),
        "bfloat16": (torch.bfloat16, "highest"),
    }.items():
        seen.clear()
        assert matmul_rate(GPT2, torch.device("cpu"), products) > 0  # pyright: ignore[reportArgumentType]
        assert set(seen) == {expected}
    assert torch.get_float32_matmul_precision() == before
