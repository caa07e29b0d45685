"""`e2e_sae.losses`: every number by hand."""

from typing import Any

import pytest
import torch

from e2e_sae.acts import SAEActs
from tests.legacy.by_hand import P, Q, by_hand, draw


def losses(**terms: Any) -> Any:
    from e2e_sae.losses import LossConfigs

    return LossConfigs.from_dict({"sparsity": {"coeff": 0.5}, **terms})


def test_calc_loss_by_hand():
    from e2e_sae.losses import calc_loss

    orig_acts, new_acts = by_hand()
    config = losses(
        in_to_orig={"total_coeff": 3.0, "hook_positions": [P, Q]}, out_to_orig={"coeff": 2.0}, out_to_in={"coeff": 4.0}
    )
    loss, log = calc_loss(orig_acts, new_acts, None, None, config)
    values = {
        f"loss/train/sparsity/{P}": (4 + 2) / 2 / 2,
        f"loss/train/in_to_orig/{P}": 2 / 4,  # (2a - a)^2 over 4 numbers
        f"loss/train/in_to_orig/{Q}": 8 / 4,
        f"loss/train/out_to_orig/{P}": 1 / 4,
        f"loss/train/out_to_in/{P}": (1 + 1 + 0 + 1) / 4,
    }
    assert {key: value.item() for key, value in log.items()} == pytest.approx(values)
    assert loss.shape == (1,)
    assert loss.item() == pytest.approx(0.5 * 1.5 + 1.5 * (0.5 + 2.0) + 2 * 0.25 + 4 * 0.75)


def test_calc_loss_on_a_log_step_adds_the_explained_variances_in_the_legacy_order():
    from e2e_sae.losses import calc_explained_variance, calc_loss

    orig_acts = {P: draw(2, 3, 4, seed=1)}
    new_acts = {P: SAEActs(draw(2, 3, 4, seed=2), draw(2, 3, 5).relu(), draw(2, 3, 4, seed=3))}
    config = losses(out_to_orig={"coeff": 0.0}, out_to_in={"coeff": 1.0})
    _, log = calc_loss(orig_acts, new_acts, None, None, config, is_log_step=True, train=False)
    pairs = {"out_to_orig": (new_acts[P].output, orig_acts[P]), "out_to_in": (new_acts[P].input, new_acts[P].output)}
    for name, (pred, target) in pairs.items():
        for ln, layer_norm in (("", False), ("_ln", True)):
            ratios = calc_explained_variance(pred, target, layer_norm)
            stem = f"loss/eval/{name}/explained_variance{ln}"
            torch.testing.assert_close(log[f"{stem}/{P}"], ratios.mean())
            torch.testing.assert_close(log[f"{stem}_std/{P}"], ratios.std())


def test_calc_loss_of_logits_is_the_kl_of_original_to_new_and_trains_the_new_alone():
    from e2e_sae.losses import calc_loss

    orig, new = draw(2, 3, 7, seed=1), draw(2, 3, 7, seed=2).requires_grad_()
    acts = {P: SAEActs(draw(2, 3, 4), draw(2, 3, 5).relu(), draw(2, 3, 4))}
    loss, log = calc_loss({P: draw(2, 3, 4)}, acts, orig, new, losses(sparsity={"coeff": 0.0}, logits_kl={"coeff": 2}))
    p, q = orig.softmax(-1), new.softmax(-1)
    kl = (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(log["loss/train/logits_kl"], kl.detach())
    torch.testing.assert_close(loss, 2 * kl[None])
    (gradient,) = torch.autograd.grad(loss.sum(), new)
    torch.testing.assert_close(gradient, 2 * (q - p).detach() / 6)


def test_calc_loss_wants_the_same_hook_points():
    from e2e_sae.losses import calc_loss

    orig_acts, new_acts = by_hand()
    with pytest.raises(AssertionError, match="must have the same hook points"):
        calc_loss({P: orig_acts[P]}, new_acts, None, None, losses())


def test_explained_variance_by_hand():
    from e2e_sae.losses import calc_explained_variance

    # Targets (0, 0), (2, 0): mean (1, 0), squared distances 1 and 1. Errors 0 and 4.
    target = torch.tensor([[[0.0, 0.0], [2.0, 0.0]]])
    pred = torch.tensor([[[0.0, 0.0], [2.0, 2.0]]])
    assert calc_explained_variance(pred, target).tolist() == [[1.0, -3.0]]
    x = draw(2, 3, 4)
    shifted = calc_explained_variance(5 * x + 2, x, layer_norm=True)
    torch.testing.assert_close(shifted, torch.ones(2, 3), atol=1e-3, rtol=0)


def test_loss_configs_list_the_terms_on_activations_in_order():
    config = losses(in_to_orig={"total_coeff": 5.0, "hook_positions": ["a", "b"]})
    assert list(config.activation_loss_configs) == ["sparsity", "in_to_orig", "out_to_orig", "out_to_in"]
    assert config.activation_loss_configs["out_to_in"] is None
    assert config.in_to_orig.coeff == 2.5
