"""JumpReLU: pre-activations above a threshold, one for each latent (Rajamanoharan et al. 2024, arXiv 2407.14435).

    latents = pre_acts H(pre_acts - threshold),   H the unit step
    penalty = sum_j H(pre_acts_j - threshold_j) = L0,   or sum_j tanh(scale latents_j ||W_dec,j||)

A threshold has no gradient through the step; it is trained with the paper's pseudo-derivatives (section 3), which look
at the pre-activations close to it:

    d latents / d threshold = -(threshold / bandwidth) K,   d H / d threshold = -(1 / bandwidth) K,
    K = 1 where |pre_acts - threshold| < bandwidth / 2, else 0

All others are the true ones (H has none in pre_acts, so that L0 trains thresholds alone). The threshold itself is the
parameter, not its logarithm. Even so Adam moves it by about lr a step at most, whatever the coefficient: in a short run
L0 follows from `initial_threshold` first. `penalty: tanh` reaches the encoder, which changes L0 at once.

What `loss.sparsity.coeff` means with `l0` (and its `p_norm` 1): one active latent more costs coeff / d_in. Beside
`out_to_in` with coefficient 1 it is the paper's lambda, both divided by d_in; beside the KL it is in nats per token.
"""

from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from e2e_sae.acts import SAEPass
from e2e_sae.saes.base import SAE, SAEConfig


class JumpReluConfig(SAEConfig):
    """Options of JumpReLU."""

    architecture: str = "jumprelu"
    """`jumprelu`."""
    penalty: Literal["l0", "tanh"] = "l0"
    """What `loss.sparsity` counts of a latent: `l0`, whether it is active (with `p_norm` 1, the default there), or
    `tanh`, tanh(`tanh_scale` x latent), with the latent times the norm of a free decoder row, which trains the encoder
    too (Anthropic 2025, https://transformer-circuits.pub/2025/january-update)."""
    tanh_scale: PositiveFloat = 4.0
    """Steepness of `penalty: tanh` (4 there, for activations of mean square 1)."""
    initial_threshold: PositiveFloat = 0.5
    """Every latent's at the start, in units of pre-activations. Found by trial for activations of mean square 1 to 10
    (`input_norm: scale` makes it 1); raise it with the scale. The paper's 0.001 is for activations of norm 1."""
    bandwidth: PositiveFloat = 0.5
    """Width of the window around a threshold whose pre-activations train it, in the same units. The paper's 0.001 is
    again for norm 1; anything from a fifteenth of pre-activations' standard deviation to all of it did as well."""
    pre_act_coeff: NonNegativeFloat = 0.0
    """Weight of sum_j max(0, threshold_j - pre_acts_j) ||W_dec,j|| / d_in, added to every loss mix: it brings latents
    that never fire closer to their thresholds (3e-6 in Anthropic 2025, without the division)."""


class JumpReluSAE(SAE):
    """Latents with a trained threshold each.

    Attributes:
        threshold: [d_sae]; never below 0, where a latent is a ReLU.
    """

    threshold: nn.Parameter

    Config = JumpReluConfig
    config: JumpReluConfig
    needs_penalty = True
    doubles_with_latents = {"threshold": True}

    def latent_parameters(self) -> dict[str, Float[Tensor, " d_sae"]]:
        """Returns `threshold`, which starts at `initial_threshold`."""
        return {"threshold": torch.full_like(self.b_enc, self.config.initial_threshold)}

    def activate(self, pre_acts: Float[Tensor, "*tokens d_sae"]) -> Float[Tensor, "*tokens d_sae"]:
        """Returns pre_acts where above their threshold, 0 elsewhere."""
        return _JumpRelu.apply(pre_acts, self.threshold, self.config.bandwidth)  # pyright: ignore[reportReturnType]

    def penalised(self, acts: SAEPass) -> Float[Tensor, "*tokens d_sae"]:
        """Returns which latents are active (1 or 0), or tanh(scale latents ||W_dec,j||)."""
        if self.config.penalty == "tanh":
            return torch.tanh(self.config.tanh_scale * super().penalised(acts))
        assert acts.pre_acts is not None, "a JumpReLU's pre-activations are kept"
        return _Step.apply(acts.pre_acts, self.threshold, self.config.bandwidth)  # pyright: ignore[reportReturnType]

    def extra_losses(self, acts: SAEPass) -> dict[str, Float[Tensor, "*tokens"]]:
        """Returns `pre_act`, if it has a weight."""
        if not self.config.pre_act_coeff:
            return {}
        assert acts.pre_acts is not None, "a JumpReLU's pre-activations are kept"
        missing = super().penalised(replace(acts, latents=torch.relu(self.threshold - acts.pre_acts)))
        return {"pre_act": missing.sum(-1) * (self.config.pre_act_coeff / self.d_in)}

    @torch.no_grad()
    def after_step(self, acts: SAEPass) -> None:
        """Does what every SAE does, and keeps thresholds from becoming negative."""
        super().after_step(acts)
        self.threshold.clamp_(min=0)


class _JumpRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_acts, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(pre_acts > threshold, pre_acts, 0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        pre_acts, threshold = ctx.saved_tensors
        (g,) = grad_outputs
        d_pre_acts = torch.where(pre_acts > threshold, g, 0) if ctx.needs_input_grad[0] else None
        return d_pre_acts, threshold * _step_gradient(g, pre_acts, threshold, ctx.bandwidth), None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_acts, threshold)
        ctx.bandwidth = bandwidth
        return (pre_acts > threshold).to(threshold.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[None, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        pre_acts, threshold = ctx.saved_tensors
        return None, _step_gradient(grad_outputs[0], pre_acts, threshold, ctx.bandwidth), None


def _step_gradient(
    g: Float[Tensor, "*tokens d_sae"],
    pre_acts: Float[Tensor, "*tokens d_sae"],
    threshold: Float[Tensor, " d_sae"],
    bandwidth: float,
) -> Float[Tensor, " d_sae"]:
    """Returns the threshold's gradient from g, that of H: -(1 / bandwidth) sum over tokens of g K."""
    is_close = (pre_acts - threshold).abs() < bandwidth / 2
    return torch.where(is_close, g, 0).reshape(-1, len(threshold)).sum(0, dtype=threshold.dtype) / -bandwidth
