"""Features made by hand, over a vocabulary that would break careless pages."""

import torch

from e2e_sae.acts import Position
from e2e_sae.analysis.feature_data import N_BINS, N_TOP, Activity
from e2e_sae.analysis.feature_effects import N_AFTER, N_BEFORE, Contexts, Effects
from e2e_sae.analysis.feature_html import Features, Other
from e2e_sae.analysis.feature_lens import Lens
from e2e_sae.analysis.similarity import Neighbours

HOSTILE = [
    "<script>window.pwned = 1</script>",
    "</script><img src='https://example.com/x' onerror='window.pwned = 2'>",
    "' onmouseover='window.pwned = 3",
    '" onload="window.pwned = 4',
    "\n\t\u202e\u2028\x00",
    "{{ 7 * 7 }}&amp;",
    "javascript:window.pwned=5",
]
TEXTS = [*HOSTILE, " def", " class", " return", "self", "\n"]
"""Of tokens, by id."""
N, D_SAE, W = 5, 9, N_BEFORE + 1 + N_AFTER
POSITION = Position("blocks.1.hook_resid_pre", "blocks.1.hook_resid_pre")


def tiny_features(label: str = "", seed: int = 0) -> Features:
    """Returns features of 9 latents, of which 0, 2, 4, 6 and 8 have pages; page n is about token `7 + n`, the def page
    has the largest strength and the smallest frequency, and so on in order; 8 is dead."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.arange(0, D_SAE, 2)
    tokens = torch.randint(0, len(HOSTILE), (N, N_TOP + 25, W), generator=generator, dtype=torch.int32)
    tokens[:, :, N_BEFORE] = 7 + torch.arange(N, dtype=torch.int32)[:, None]
    tokens[:, :, : N_BEFORE // 2] = -1
    tokens[4] = -1
    acts = torch.zeros(tokens.shape)
    acts[:4, :, N_BEFORE] = torch.linspace(4, 1, N_TOP + 25)
    acts[:4, :, N_BEFORE - 2] = 0.5
    n_active = torch.tensor([10, 0, 20, 0, 30, 0, 40, 7, 0])
    histogram = torch.zeros(D_SAE, N_BINS, dtype=torch.int64)
    histogram[:, 40], histogram[:, 42] = n_active, n_active // 2
    histogram[8] = 0
    largest = torch.tensor([4.5, 0, 3.5, 0, 2.5, 0, 1.5, 1, 0])
    places = torch.full((D_SAE, N_TOP), -1), torch.full((D_SAE, 25), -1)
    activity = Activity(100, n_active, largest.double() * 2, largest, histogram, *places)
    kl = torch.full((N, 10), torch.nan)
    kl[:4] = torch.tensor([0.3, 0.1, 0.4, 0.2])[:, None]
    ids = torch.arange(N)[:, None] + torch.arange(6)
    cosines = torch.tensor([0.9, 0.5, 0.1]).expand(N, 3) - torch.arange(N)[:, None] / 100
    return Features(
        label=label,
        folder=f"{label}-blocks-1-hook_resid_pre" if label else "",
        run="<b>run</b> & co",
        architecture="relu",
        position=POSITION,
        activity=activity,
        latents=latents,
        contexts=Contexts(tokens, acts),
        effects=Effects(kl, -kl, torch.where(kl.isnan(), kl, torch.tensor(2.0))),
        lens=Lens(ids, ids.float(), ids.flip(1), -ids.float()),
        here=Neighbours(cosines, torch.tensor([2, 7, 4]).expand(N, 3)),
    )


def tiny_other(features: Features) -> Other:
    """Returns features as another SAE's, with equal neighbours for all pages."""
    return Other(features, Neighbours(torch.full((N, 2), 0.25), torch.tensor([6, 1]).expand(N, 2)))
