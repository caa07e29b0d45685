"""The dictionary of an SAE, as geometry sees it: the directions of its alive latents, and how near others are.

Nothing here needs a language model, unless alive latents must be counted (`alive.py`). A dictionary's tensors are in
memory only while something is computed from them.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from e2e_sae.analysis.alive import alive
from e2e_sae.analysis.similarity import (
    N_CANDIDATES,
    nearest_both,
    nearest_others,
    one_to_one,
    unit_directions,
)
from e2e_sae.analysis.study import Study, digest_of
from e2e_sae.models.lm import resolve_device


@dataclass(frozen=True)
class Dictionary:
    """Which directions are meant, without them."""

    run_id: str
    """The run."""
    position: str
    """Name of the SAE's position."""
    latents: Int[Tensor, " n"]
    """Numbers of the alive latents, ascending."""
    key: dict[str, Any]
    """What the directions are known by, for the study's cache."""

    def __len__(self) -> int:
        return len(self.latents)

    def directions(self, study: Study) -> Float[Tensor, "n d_out"]:
        """Returns the alive latents' decoder directions, of norm 1, on the study's device."""
        W_dec = study.stored(self.run_id).saes[self.position].tensors["W_dec"]
        # Decoders of the paper's files are transposed: whole rows first, then the choice.
        kept = W_dec if len(self) == len(W_dec) else W_dec[self.latents]
        return unit_directions(kept.to(resolve_device(study.device)))


class Across(NamedTuple):
    """How near two dictionaries are to each other; numbers of latents are the SAEs' own."""

    cosines: Float[Tensor, " n_a"]
    """Largest cosine of each of A's with any of B's."""
    nearest: Int[Tensor, " n_a"]
    """With which."""
    cosines_back: Float[Tensor, " n_b"]
    """Largest cosine of each of B's with any of A's."""
    nearest_back: Int[Tensor, " n_b"]
    """With which."""
    pairs: Int[Tensor, "n_pairs 2"]
    """Latents of A and of B, one to one."""
    pair_cosines: Float[Tensor, " n_pairs"]
    """Their cosines."""


class Within(NamedTuple):
    """How near the latents of one dictionary are to each other."""

    cosines: Float[Tensor, " n"]
    """Largest cosine of each with any other one."""
    nearest: Int[Tensor, " n"]
    """With which."""


def dictionary(study: Study, run_id: str, position: str) -> Dictionary:
    """Returns the dictionary of an SAE's alive latents."""
    mask = alive(study, run_id, position)
    key = {"sae": [study.fingerprint(run_id), position], "alive": digest_of({"mask": mask})}
    return Dictionary(run_id, position, mask.nonzero()[:, 0], key)


def within(study: Study, a: Dictionary) -> Within:
    """Returns the nearest other one of each direction; kept in the study's cache.

    Raises:
        ValueError: fewer than two are alive.
    """

    def compute() -> dict[str, Tensor]:
        cosines, nearest = nearest_others(a.directions(study))
        return Within(cosines[:, 0], a.latents[nearest[:, 0].cpu()])._asdict()

    return Within(**study.cached("within", a.key, compute))


def across(study: Study, a: Dictionary, b: Dictionary) -> Across:
    """Returns how near two dictionaries are to each other; kept in the study's cache.

    Raises:
        ValueError: one has no alive latent.
    """

    def compute() -> dict[str, Tensor]:
        A, B = a.directions(study), b.directions(study)
        found = nearest_both(A, B, N_CANDIDATES)
        pairs = one_to_one(A, B, found)
        in_b, in_a = ((x.cosines[:, 0].cpu(), x.indices[:, 0].cpu()) for x in found)
        return Across(
            in_b[0],
            b.latents[in_b[1]],
            in_a[0],
            a.latents[in_a[1]],
            torch.stack([a.latents[pairs.a.cpu()], b.latents[pairs.b.cpu()]], dim=1),
            pairs.cosines,
        )._asdict()

    return Across(**study.cached("across", {"a": a.key, "b": b.key}, compute))
