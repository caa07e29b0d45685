"""`e2e_sae.losses` of the paper's library: one call for loss and log values, and the explained variance."""

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from e2e_sae.legacy.errors import LegacyAssertion
from e2e_sae.legacy.passes import NewActs, clean_pass, spliced_pass
from e2e_sae.losses import LossConfigs, weighted_loss
from e2e_sae.metrics import explained_variance_ratios, layer_norm, legacy_explained_variances


def calc_explained_variance(
    pred: Float[Tensor, "*tokens d"], target: Float[Tensor, "*tokens d"], layer_norm: bool = False
) -> Float[Tensor, " *tokens"]:
    """Returns 1 - ||pred - target||^2 / ||target - mean of target over all tokens||^2 for each token.

    Args:
        layer_norm: normalise both first, each to mean 0 and variance 1 over its width.
    """
    if layer_norm:
        pred, target = _layer_norm_pre(pred), _layer_norm_pre(target)
    width = target.shape[-1]
    return explained_variance_ratios(pred.reshape(-1, width), target.reshape(-1, width)).reshape(target.shape[:-1])


def _layer_norm_pre(x: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens d"]:
    return layer_norm(x)


def calc_loss(
    orig_acts: Mapping[str, Tensor],
    new_acts: NewActs,
    orig_logits: Float[Tensor, "batch pos vocab"] | None,
    new_logits: Float[Tensor, "batch pos vocab"] | None,
    loss_configs: LossConfigs,
    is_log_step: bool = False,
    train: bool = True,
) -> tuple[Float[Tensor, "1"], dict[str, Float[Tensor, ""]]]:
    """Returns the weighted loss, and the unweighted values by log key.

    Args:
        orig_acts: activations of the clean model by hook name.
        new_acts: of the spliced model, at the same names.
        orig_logits: of the clean model; None in a local run.
        new_logits: of the spliced model; None in a local run.
        loss_configs: the terms.
        is_log_step: add the explained variances (`metrics.legacy_explained_variances`).
        train: whether keys begin with `loss/train` or `loss/eval`.

    Raises:
        LegacyAssertion: the two sets of activations have different names.
    """
    if set(orig_acts) != set(new_acts):
        raise LegacyAssertion(
            f"orig_acts and new_acts must have the same hook points: got {sorted(orig_acts)} and {sorted(new_acts)}"
        )
    clean, spliced = clean_pass(orig_acts, orig_logits), spliced_pass(new_acts, new_logits)
    total, values = weighted_loss(loss_configs.terms, clean, spliced)
    m = "train" if train else "eval"
    means = {f"loss/{m}/{name}": mean for name, mean in values.items()}
    if is_log_step:
        means |= legacy_explained_variances(loss_configs.terms, clean, spliced, m)
    return total.reshape(1), {key: mean.value.detach() for key, mean in means.items()}
