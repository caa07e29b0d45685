"""What SAEs make of clean activations, token by token: norms, cosines, components along principal directions.

One clean pass over the rows for all SAEs of a language model; what is kept of it is sums, counts and samples of fixed
size, whatever the number of rows.

    ratio = ||a_hat|| / ||a||,   cos = a . a_hat / (||a|| ||a_hat||)
    x_i = (a - mean) . v_i,   y_i = (a_hat - mean) . v_i

a: activation, a_hat: the SAE's output for it, v_i: principal direction of the clean activations with their mean
(`clean_directions.py`). r_i = Pearson's correlation of x_i and y_i over tokens. Tokens whose activation is 0 have no
ratio and no cosine, and are left out there.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from e2e_sae.acts import TokenBatch
from e2e_sae.analysis.clean_directions import Directions, clean_directions, counted_of, vectors_of
from e2e_sae.analysis.compared import ComparedSAE, Group, opened
from e2e_sae.analysis.study import Study
from e2e_sae.models.runner import apply_sae, run_clean
from e2e_sae.ops.tokens import at_least_float32
from e2e_sae.saes import SAE
from e2e_sae.seeds import seed_for

N_BINS, N_DECODER_BINS = 200, 50
"""Of histograms of cosines, from -1 to 1: of tokens, and of latents, which are fewer."""
N_SHOWN = 3
"""Directions whose mean components by position are kept: the paper's script's."""
N_SAMPLED = {"position 0": 300, "end of text": 300, "other": 2000}
"""Tokens of a sample at most, by place (fig. 22's): as many points as a figure can show."""


class Sample:
    """At most `n` rows of a stream, each of its rows with the same chance."""

    def __init__(self, n: int, seed: int):
        self._n = n
        self._generator = torch.Generator().manual_seed(seed)
        self._keys: Tensor = torch.zeros(0)
        self.rows: Tensor = torch.zeros(0)
        """Those kept, [<= n, ...]."""

    def update(self, rows: Float[Tensor, "new width"]) -> None:
        """Shows it further rows."""
        # A row stays while its random number is among the n smallest.
        keys = torch.cat([self._keys, torch.rand(len(rows), generator=self._generator, dtype=torch.float64)])
        kept = keys.argsort()[: self._n].sort().values
        n_before = len(self._keys)
        new = rows[(kept[kept >= n_before] - n_before).to(rows.device)].cpu()
        self.rows = torch.cat([self.rows[kept[kept < n_before]], new]) if n_before else new
        self._keys = keys[kept]


class Pairs:
    """Sums over pairs (x, y) of components, one for each direction, for Pearson's r; in float64."""

    def __init__(self) -> None:
        self._n = 0
        self._sums: Tensor | float = 0.0

    def update(self, x: Float[Tensor, "rows n"], y: Float[Tensor, "rows n"]) -> None:
        """Adds tokens."""
        self._n += len(x)
        self._sums = self._sums + torch.stack([z.sum(0) for z in (x, y, x * x, y * y, x * y)])

    def r(self) -> Float[Tensor, " n"]:
        """Returns Pearson's r; NaN where one of the two does not vary."""
        assert isinstance(self._sums, Tensor)
        x, y, xx, yy, xy = self._sums.cpu() / max(1, self._n)
        x_var, y_var = xx - x * x, yy - y * y
        # Below this, what looks like variance is rounding.
        constant = (x_var <= 1e-12 * xx) | (y_var <= 1e-12 * yy)
        return torch.where(constant, float("nan"), (xy - x * y) / (x_var * y_var).sqrt())


def bins_of(values: Float[Tensor, " n"], n_bins: int = N_BINS) -> Int[Tensor, " n_bins"]:
    """Returns how many values fall into each of the equal bins from -1 to 1."""
    bins = ((values.double() + 1) / 2 * n_bins).long().clamp(0, n_bins - 1)
    return torch.bincount(bins, minlength=n_bins)


class Reconstruction(NamedTuple):
    """What was found of one SAE; all on the CPU."""

    counts: Float[Tensor, " n_pos"]
    """Vectors at each position that have a ratio and a cosine."""
    norm_in: Float[Tensor, " n_pos"]
    """Mean ||a|| at each position; like all means here NaN where nothing counted."""
    norm_out: Float[Tensor, " n_pos"]
    """Mean ||a_hat||."""
    ratio: Float[Tensor, " n_pos"]
    """Mean ||a_hat|| / ||a||."""
    cos: Float[Tensor, " n_pos"]
    """Mean cosine of a and a_hat."""
    cos_bins: Int[Tensor, " n_bins"]
    """Tokens by cosine, all positions."""
    sampled: Float[Tensor, "n_sampled 5"]
    """(place, ||a||, ||a_hat||, x_0, y_0) of sampled tokens, the same ones for all SAEs of a hook point; the place is a
    number in `N_SAMPLED`."""
    component: Float[Tensor, "n_pos n_shown"]
    """Mean y_i at each position."""
    r_first: Float[Tensor, " n_directions"]
    """r_i over tokens at position 0."""
    r_later: Float[Tensor, " n_directions"]
    """r_i over tokens at later positions."""
    decoder_bins: Int[Tensor, " n_decoder_bins"]
    """Latents that were active at least once, by the cosine of their decoder direction with direction 0."""


class _Seen:
    """Sums over what one SAE makes."""

    def __init__(self, sae: SAE, directions: Directions, seed: int):
        self._sae, self._directions = sae, directions
        n_pos = len(directions.counts)
        zeros = torch.zeros(n_pos, dtype=torch.float64, device=sae.device)
        self._counts = zeros.clone()
        self._means = {name: zeros.clone() for name in ("norm_in", "norm_out", "ratio", "cos")}
        self._cos_bins = torch.zeros(N_BINS, dtype=torch.int64, device=sae.device)
        self._samples = [Sample(n, seed_for(seed, place)) for place, n in N_SAMPLED.items()]
        self._component = zeros.new_zeros(n_pos, min(N_SHOWN, len(directions.axes)))
        self._n_components = zeros.clone()
        self._pairs = Pairs(), Pairs()
        self._fired = torch.zeros(sae.d_sae, dtype=torch.bool, device=sae.device)

    def update(
        self,
        x: Float[Tensor, "batch pos *heads d"],
        counted: Bool[Tensor, "batch pos"],
        place: Int[Tensor, "batch pos"],
    ) -> None:
        """Adds a batch of clean activations.

        Args:
            x: the activations.
            counted: which tokens count.
            place: of each token, a number in `N_SAMPLED`.
        """
        acts = apply_sae(self._sae, x)
        counted = counted.to(acts.output.device)
        a, a_hat = vectors_of(at_least_float32(acts.input)), vectors_of(at_least_float32(acts.output))
        fired = (vectors_of(acts.latents) != 0) & counted[..., None, None]
        self._fired |= fired.flatten(0, 2).any(0)
        everywhere = counted[..., None].expand(a.shape[:3])
        x, y = self._directions.components(a), self._directions.components(a_hat)
        norm_in, norm_out = a.norm(dim=-1), a_hat.norm(dim=-1)
        self._add_norms(norm_in, norm_out, F.cosine_similarity(a, a_hat, dim=-1), everywhere & (norm_in > 0))
        self._add_components(x, y, everywhere)
        rows = torch.stack([norm_in, norm_out, x[..., 0], y[..., 0]], dim=-1)
        for n, sample in enumerate(self._samples):
            sample.update(F.pad(rows[everywhere & (place[..., None] == n)], (1, 0), value=n))

    def _add_norms(
        self,
        norm_in: Float[Tensor, "batch pos heads"],
        norm_out: Float[Tensor, "batch pos heads"],
        cos: Float[Tensor, "batch pos heads"],
        counted: Bool[Tensor, "batch pos heads"],
    ) -> None:
        values = {"norm_in": norm_in, "norm_out": norm_out, "ratio": norm_out / norm_in, "cos": cos}
        for name, value in values.items():
            self._means[name] += torch.where(counted, value.double(), 0.0).sum((0, 2))
        self._counts += counted.sum((0, 2))
        self._cos_bins += bins_of(cos[counted])

    def _add_components(
        self,
        x: Float[Tensor, "batch pos heads n"],
        y: Float[Tensor, "batch pos heads n"],
        counted: Bool[Tensor, "batch pos heads"],
    ) -> None:
        shown = y[..., : self._component.shape[1]]
        self._component += torch.where(counted[..., None], shown, 0.0).sum((0, 2))
        self._n_components += counted.sum((0, 2))
        for pairs, part in zip(self._pairs, (slice(0, 1), slice(1, None)), strict=True):
            pairs.update(x[:, part][counted[:, part]], y[:, part][counted[:, part]])

    def result(self) -> Reconstruction:
        """Returns what was found."""
        means = {name: (total / self._counts).cpu() for name, total in self._means.items()}
        direction = self._directions.axes[0].to(self._sae.device)
        cosines = direction @ self._sae.dict_elements.double()[:, self._fired]
        return Reconstruction(
            counts=self._counts.cpu(),
            **means,
            cos_bins=self._cos_bins.cpu(),
            sampled=torch.cat([sample.rows for sample in self._samples]),
            component=(self._component / self._n_components[:, None]).cpu(),
            r_first=self._pairs[0].r(),
            r_later=self._pairs[1].r(),
            decoder_bins=bins_of(cosines, N_DECODER_BINS).cpu(),
        )


@torch.no_grad()
def look_at(
    lm: nn.Module,
    batches: Iterable[TokenBatch],
    saes: Sequence[tuple[str, SAE]],
    directions: Mapping[str, Directions],
    end_of_text: int | None = None,
    seed: int = 0,
) -> list[Reconstruction]:
    """Returns what each SAE makes of the clean activations at its hook point, over one clean pass.

    Args:
        lm: the language model.
        batches: token rows.
        saes: (hook point, SAE) pairs.
        directions: of every hook point.
        end_of_text: token between documents; None: none.
        seed: of the sampled tokens.
    """
    seen = [(point, _Seen(sae, directions[point], seed_for(seed, "sample", point))) for point, sae in saes]
    points = list(dict.fromkeys(point for point, _ in saes))
    for batch in batches:
        clean = run_clean(lm, batch, points, want_logits=False)
        place = torch.where(batch.tokens == (-1 if end_of_text is None else end_of_text), 1, 2)
        place[:, 0] = 0
        for point, one in seen:
            one.update(clean.at(point), counted_of(batch), place)
    return [one.result() for _, one in seen]


def reconstructions(study: Study, group: Group) -> list[tuple[ComparedSAE, Reconstruction]]:
    """Returns what every SAE of a group makes of the study's rows; kept in its cache."""

    def compute() -> dict[str, Tensor]:
        saes = list(zip((sae.point for sae in group.saes), opened(study, group), strict=True))
        lm = study.lm(study.stored(group.run_id))
        batches = study.batches(group.run_id, desc="reconstructions")
        end_of_text = getattr(getattr(lm, "tokenizer", None), "eos_token_id", None)
        found = look_at(lm, batches, saes, directions, end_of_text, study.seed)
        return {f"{n}/{name}": value for n, one in enumerate(found) for name, value in one._asdict().items()}

    directions = clean_directions(study, group.run_id, group.points)
    key = {**group.facts, "n_samples": study.n_samples, "seed": study.seed}
    tensors = study.cached("reconstructions", key, compute)
    return [
        (sae, Reconstruction(*(tensors[f"{n}/{name}"] for name in Reconstruction._fields)))
        for n, sae in enumerate(group.saes)
    ]
