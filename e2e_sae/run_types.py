"""The types of run, named as in the paper by what the SAEs learn to keep, and how figures show them."""

from e2e_sae.losses import LossConfigs

COLOURS = {"local": "#0173b2", "e2e": "#de8f05", "e2e+ds": "#029e73"}
"""Colour-blind safe (seaborn's `colorblind`), in the paper's order of types."""
MORE_COLOURS = ("#d55e00", "#cc78bc", "#ca9161", "#949494")
"""The palette's next, for other mixes of losses."""
MARKERS = {"local": "^", "e2e": "o", "e2e+ds": "X"}
"""The paper's (analysis/plot_settings.py)."""


def run_type(loss: LossConfigs) -> str:
    """Returns the type that a mix of losses makes: `local`, `e2e`, `e2e+ds`, or a mix such as `e2e+local`.

    Terms with coefficient 0 do not count, and a loss of sparsity alone counts as local, as in the paper's library.
    """
    parts: list[str] = []
    if loss.logits_kl is not None and loss.logits_kl.coeff > 0:
        parts.append("e2e")
    if loss.in_to_orig is not None and loss.in_to_orig.total_coeff > 0:
        parts.append("ds")
    if not parts or (loss.out_to_in is not None and loss.out_to_in.coeff > 0):
        parts.append("local")
    return "+".join(parts)
