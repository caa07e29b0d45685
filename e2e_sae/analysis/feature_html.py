"""Features of an SAE as HTML: an index, and a page for each latent.

Each file holds everything it needs, style and script included, and may load nothing: its Content-Security-Policy allows
the script and the style in it, by their hashes, and no request at all. Whatever comes from the data is escaped by the
templates, or is JSON without `<`, `>` and `&` that the script shows as text.
"""

import base64
import functools
import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from e2e_sae.acts import Position
from e2e_sae.analysis.feature_data import BINS_PER_DECADE, LOG10_MIN, N_GROUPS, N_TOP, Activity
from e2e_sae.analysis.feature_effects import N_ABLATED, N_BEFORE, Contexts, Effects
from e2e_sae.analysis.feature_lens import Lens
from e2e_sae.analysis.similarity import Neighbours
from e2e_sae.analysis.vocabulary import visible

TEMPLATES = Path(__file__).resolve().parent / "templates"
N_SHADES = 9
"""Colours of activations, from just above 0 to the latent's largest."""
N_CHIPS = 4
"""Different tokens that the index shows of a latent's top contexts."""
N_SEARCHED = 5
"""Top contexts of a latent that the index knows."""


@dataclass(frozen=True)
class Features:
    """Everything that is shown of one SAE."""

    label: str
    """What it is called beside others; empty if it is alone."""
    folder: str
    """Its folder, from that of all pages."""
    run: str
    """Its run."""
    architecture: str
    """Its architecture."""
    position: Position
    """Where it sits."""
    activity: Activity
    """What all latents do."""
    latents: Int[Tensor, " N"]
    """Those with pages, ascending."""
    contexts: Contexts
    """Of each page: the top places, then the sampled ones."""
    effects: Effects
    """Of each page."""
    lens: Lens | None
    """Of each page; None where the SAE does not write into the residual stream."""
    here: Neighbours | None
    """The nearest latents of each page's, in the same SAE; None if it has only one."""

    @functools.cached_property
    def with_page(self) -> frozenset[int]:
        """Latents that have a page."""
        return frozenset(self.latents.tolist())


class Other(NamedTuple):
    """Another SAE, as seen from a page."""

    features: Features
    """It."""
    nearest: Neighbours
    """Its latents that are nearest to those with pages."""


class _Piece(NamedTuple):
    """A part of a context."""

    text: str
    """Visible."""
    shade: int
    """0: not active; 1 to `N_SHADES`."""
    title: str
    """What the pointer is told."""
    is_place: bool
    """Whether it is the token that the context was chosen for."""


class _Context(NamedTuple):
    """A context."""

    value: float
    """Activation at its place."""
    pieces: list[_Piece]
    """Its text."""
    kl: float | None
    """Effect of the ablation on its row, nats; None where there was none."""


def feature_page(features: Features, page: int, texts: Sequence[str], other: Other | None) -> str:
    """Returns a latent's page.

    Args:
        features: of its SAE.
        page: which of the pages.
        texts: of tokens, by id.
        other: an SAE to look for its like in.
    """
    latent, activity = int(features.latents[page]), features.activity
    n_top, largest = activity.top.shape[1], float(activity.largest[latent])
    contexts = [_context(features, page, slot, texts, largest) for slot in range(features.contexts.tokens.shape[1])]
    sample = [context for context in contexts[n_top:] if context is not None]
    parts = [part.tolist() for part in torch.arange(len(sample)).tensor_split(N_GROUPS)]
    neighbours = _linked(features.here, page, features, "../")
    elsewhere = [] if other is None else _linked(other.nearest, page, other.features, f"../../{other.features.folder}/")
    return _rendered(
        "feature.html",
        "feature.js",
        features=features,
        other=other,
        latent=latent,
        previous=int(features.latents[page - 1]) if page else None,
        following=int(features.latents[page + 1]) if page + 1 < len(features.latents) else None,
        frequency=float(activity.frequency[latent]),
        n_active=int(activity.n_active[latent]),
        n_tokens=activity.n_tokens,
        largest=largest,
        mean=float(activity.mean[latent]),
        kl=_finite(features.effects.kl_per_token[page]),
        ce_increase=_finite(features.effects.ce_increase_per_token[page]),
        histogram=histogram(activity.histogram[latent]),
        top=[context for context in contexts[:n_top] if context is not None],
        groups=[[sample[i] for i in part] for part in parts if part],
        lens=_lens(features.lens, page, texts),
        neighbours=neighbours,
        elsewhere=elsewhere,
        n_ablated=N_ABLATED,
    )


def index_page(features: Features, texts: Sequence[str], other: Other | None, all_features: Sequence[Features]) -> str:
    """Returns the index of an SAE's pages, all of them in it as data: the script shows, sorts and searches them."""
    latents = [_summary(features, page, texts, other) for page in range(len(features.latents))]
    return _rendered(
        "index.html",
        "index.js",
        features=features,
        other=other,
        siblings=all_features,
        n_alive=int((features.activity.n_active > 0).sum()),
        data=json_for_html({"latents": latents, "hasOther": other is not None}),
        n_top=N_TOP,
        n_ablated=N_ABLATED,
    )


def overview_page(all_features: Sequence[Features], others: Sequence[Other | None]) -> str:
    """Returns the page that leads to several SAEs."""
    medians = [None if other is None else float(other.nearest.cosines[:, 0].median()) for other in others]
    alive = [int((each.activity.n_active > 0).sum()) for each in all_features]
    return _rendered("overview.html", None, rows=list(zip(all_features, alive, others, medians, strict=True)))


def page_name(latent: int) -> str:
    """Returns the file of a latent's page, from its SAE's folder."""
    return f"latents/{latent}.html"


def histogram(counts: Int[Tensor, " n_bins"]) -> dict[str, Any] | None:
    """Returns the bars and ticks of a histogram, in units of its width and height (0 to 1); None if it is empty."""
    filled = counts.nonzero()[:, 0].tolist()
    if not filled:
        return None
    first, last = filled[0], filled[-1] + 1
    n, most = last - first, int(counts.max())
    edges = [10 ** (LOG10_MIN + i / BINS_PER_DECADE) for i in range(first, last + 1)]
    bars = [
        {"x": i / n, "width": 1 / n, "height": int(counts[first + i]) / most, "title": f"{a:.3g} to {b:.3g}: {count:,}"}
        for i, (a, b) in enumerate(itertools.pairwise(edges))
        if (count := int(counts[first + i]))
    ]
    step = max(1, n // 4)
    ticks = [{"x": i / n, "text": f"{edges[i]:.2g}"} for i in range(0, n + 1, step)]
    return {"bars": bars, "ticks": ticks, "most": most}


def json_for_html(value: Any) -> str:
    """Returns JSON that stays what it is inside a `<script>`."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _context(features: Features, page: int, slot: int, texts: Sequence[str], largest: float) -> _Context | None:
    tokens: list[int] = features.contexts.tokens[page, slot].tolist()
    acts: list[float] = features.contexts.acts[page, slot].tolist()
    if tokens[N_BEFORE] < 0:
        return None
    pieces: list[_Piece] = []
    for is_silent, some in itertools.groupby(range(len(tokens)), lambda i: acts[i] == 0 and i != N_BEFORE):
        inside = [i for i in some if tokens[i] >= 0]
        if is_silent:
            pieces.append(_Piece(visible("".join(texts[tokens[i]] for i in inside), spaces=False), 0, "", False))
            continue
        for i in inside:
            shade = min(N_SHADES, math.ceil(N_SHADES * abs(acts[i]) / largest)) if acts[i] else 0
            title = f"{acts[i]:.3g} · token {tokens[i]}"
            pieces.append(_Piece(visible(texts[tokens[i]]), shade, title, i == N_BEFORE))
    kl = features.effects.kl[page, slot] if slot < features.effects.kl.shape[1] else torch.tensor(torch.nan)
    return _Context(acts[N_BEFORE], pieces, _finite(kl))


def _lens(lens: Lens | None, page: int, texts: Sequence[str]) -> dict[str, list[tuple[str, float]]] | None:
    if lens is None:
        return None
    ends = {"promoted": (lens.top, lens.top_effects), "suppressed": (lens.bottom, lens.bottom_effects)}
    shown: dict[str, list[tuple[str, float]]] = {}
    for name, (ids, effects) in ends.items():
        tokens: list[int] = ids[page].tolist()
        shown[name] = [(visible(texts[i]), e) for i, e in zip(tokens, effects[page].tolist(), strict=True)]
    return shown


def _linked(found: Neighbours | None, page: int, features: Features, way: str) -> list[tuple[int, float, str | None]]:
    """Returns (latent, cosine, link or None where it has no page) of the nearest; `way` leads to their SAE's folder."""
    if found is None:
        return []
    return [
        (i, cosine, f"{way}{page_name(i)}" if i in features.with_page else None)
        for i, cosine in zip(found.indices[page].tolist(), found.cosines[page].tolist(), strict=True)
    ]


def _summary(features: Features, page: int, texts: Sequence[str], other: Other | None) -> dict[str, Any]:
    latent, activity = int(features.latents[page]), features.activity
    n_top = activity.top.shape[1]
    tokens = features.contexts.tokens[page, :n_top]
    peaks = Counter(texts[i] for i in tokens[:, N_BEFORE].tolist() if i >= 0)
    rows = [row for row in tokens[:N_SEARCHED].tolist() if row[N_BEFORE] >= 0]
    return {
        "n": latent,
        "frequency": _rounded(activity.frequency[latent]),
        "largest": _rounded(activity.largest[latent]),
        "kl": _rounded(features.effects.kl_per_token[page]),
        "here": None if features.here is None else _rounded(features.here.cosines[page, 0]),
        "other": None if other is None else _rounded(other.nearest.cosines[page, 0]),
        "tokens": [text for text, _ in peaks.most_common(N_CHIPS)],
        "contexts": [
            [_joined(row[:N_BEFORE], texts), texts[row[N_BEFORE]], _joined(row[N_BEFORE + 1 :], texts)] for row in rows
        ],
        "promoted": [] if features.lens is None else [texts[i] for i in features.lens.top[page].tolist()],
    }


def _joined(tokens: Sequence[int], texts: Sequence[str]) -> str:
    return "".join(texts[i] for i in tokens if i >= 0)


def _finite(value: Tensor) -> float | None:
    return float(value) if bool(torch.isfinite(value)) else None


def _rounded(value: Tensor) -> float | None:
    finite = _finite(value)
    return None if finite is None else float(f"{finite:.4g}")


def _rendered(template: str, script: str | None, **values: Any) -> str:
    style = _file("style.css")
    code = "" if script is None else _file(script)
    return (
        _environment()
        .get_template(template)
        .render(
            style=style, script=code, style_hash=_sha256(style), script_hash=_sha256(code), n_shades=N_SHADES, **values
        )
    )


@functools.cache
def _environment() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "page_name": page_name}
    return environment


@functools.cache
def _file(name: str) -> Any:
    import markupsafe

    return markupsafe.Markup((TEMPLATES / name).read_text(encoding="utf-8"))  # ours, no data in it


def _sha256(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _number(value: float | None, digits: int = 3) -> str:
    """Returns a number as readers see it, a dash for None.

    >>> _number(0.000123456), _number(1234.5), _number(121.7, 2), _number(None)
    ('0.000123', '1,234', '122', '–')
    """
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"
