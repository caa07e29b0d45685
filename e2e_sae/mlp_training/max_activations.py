"""Which images each dictionary element of an MLP's sparsifiers reacts to most, and how often it reacts at all.

An element's activation is its latent (SAE), or its similarity where it is among the k chosen codes (codebook).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from e2e_sae.checkpoint.files import new_file, write_json, write_tensors
from e2e_sae.checkpoint.run_dir import RunDir
from e2e_sae.data.images import ImageData, Images
from e2e_sae.errors import UserError
from e2e_sae.log import logger
from e2e_sae.mlp_training.config import MaxActConfig
from e2e_sae.mlp_training.run import open_data
from e2e_sae.mlp_training.stored import check_fits, load_mlp_mod
from e2e_sae.models.mlp import MLPMod
from e2e_sae.saes.codebook import Codebook


class LayerMaxActs(NamedTuple):
    """What the elements of one layer's sparsifier react to."""

    top_acts: Float[Tensor, "d_sae n_top"]
    """Greatest activations, the greatest first; 0 where an element is active on fewer images."""
    top_images: Int[Tensor, "d_sae n_top"]
    """Their images' numbers in the part of the data, earlier ones first among equals; -1 where there is none."""
    firing_frequency: Float[Tensor, " d_sae"]
    """Share of the images on which an element is active."""

    @property
    def n_dead(self) -> int:
        """Elements that no image activates."""
        return int((self.firing_frequency == 0).sum())


class MaxActData(NamedTuple):
    """The result, and where it is saved."""

    layers: dict[str, LayerMaxActs]
    """By layer index."""
    n_images: int
    """How many were looked at."""
    folder: Path
    """`max_acts.safetensors`, `summary.json`, `layer_<i>.png`, `final_config.yaml`."""


def save_max_acts(config: MaxActConfig) -> MaxActData:
    """Collects the images of a trained run's elements, saves them with a picture of each layer, and returns them.

    Raises:
        UserError: the run or its data cannot be read, or do not fit together.
    """
    infer = config.infer
    if infer.model_name is None:
        raise UserError("infer.model_name is not set: name the run folder of train_mnist_saes.py")
    stored = load_mlp_mod(infer.model_name)
    hidden_sizes = stored.mlp.sizes[1:-1]
    if config.hidden_sizes not in (None, hidden_sizes):
        raise UserError(f"model.hidden_sizes is {config.hidden_sizes}, but '{infer.model_name}' has {hidden_sizes}")
    source = config.data or stored.data
    data = open_data(source)
    check_fits(stored.mlp, data, source)
    images: Images = getattr(data, infer.split)
    layers = max_acts(stored.mod, images.pixels, n_top=infer.n_top_images, batch_size=infer.batch_size)
    # The model's name ends with its own time stamp; the rest says enough.
    folder = RunDir.create(infer.save_dir, f"max-act_{infer.model_name.name}", config.to_yaml()).path
    tensors = {f"{i}.{name}": t for i, layer in layers.items() for name, t in layer._asdict().items()}
    write_tensors(folder / "max_acts.safetensors", tensors)
    n_images = len(images.labels)
    write_json(folder / "summary.json", _summary(layers, config, source, n_images))
    for i, layer in layers.items():
        title = f"layer {i}: {layer.n_dead} of {len(layer.firing_frequency)} elements dead on {n_images} images"
        _draw(folder / f"layer_{i}.png", title, layer, images, data, infer.n_elements_shown)
        logger.info(title)
    logger.info(f"max-activation data -> {folder}")
    return MaxActData(layers, n_images, folder)


@torch.no_grad()
def max_acts(
    mod: MLPMod, pixels: Float[Tensor, "image d_in"], *, n_top: int, batch_size: int
) -> dict[str, LayerMaxActs]:
    """Returns, by layer, every element's strongest images.

    Args:
        n_top: how many images to keep for each element.
        batch_size: images at a time.
    """
    collectors = {i: _TopImages(n_top) for i in mod.sparsifiers}
    for batch in pixels.split(batch_size):
        for i, acts, is_active in _activations(mod, batch):
            collectors[i].add(acts, is_active)
    return {i: collector.result() for i, collector in collectors.items()}


class _TopImages:
    """The strongest images so far, one column per element; -inf and -1 where there is none."""

    def __init__(self, n_top: int):
        self._n_top = n_top
        self._n_images = 0
        self._acts: Tensor | None = None
        self._images = torch.empty(0)
        self._n_firings = torch.zeros(())

    def add(self, acts: Float[Tensor, "batch d_sae"], is_active: Bool[Tensor, "batch d_sae"]) -> None:
        if self._acts is None:
            self._acts = acts.new_full((self._n_top, acts.shape[1]), -torch.inf)
            self._images = torch.full(self._acts.shape, -1)
            self._n_firings = torch.zeros(acts.shape[1], dtype=torch.int64)
        numbers = torch.arange(self._n_images, self._n_images + len(acts))[:, None].expand_as(is_active)
        strengths = torch.cat([self._acts, acts.masked_fill(~is_active, -torch.inf)])
        images = torch.cat([self._images, numbers.where(is_active, -1)])
        # Stable: among equals the earlier image stays first, whatever the batch size.
        self._acts, order = strengths.sort(dim=0, descending=True, stable=True)
        self._acts, order = self._acts[: self._n_top], order[: self._n_top]
        self._images = images.gather(0, order)
        self._n_firings += is_active.sum(0)
        self._n_images += len(acts)

    def result(self) -> LayerMaxActs:
        assert self._acts is not None, "no image was looked at"
        acts = self._acts.masked_fill(self._images < 0, 0.0)
        return LayerMaxActs(acts.T, self._images.T, self._n_firings / self._n_images)


def _activations(mod: MLPMod, pixels: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yields (layer, activations, which of them are active), both [batch, d_sae]."""
    output = mod(pixels)
    for i, sparsifier in mod.sparsifiers.items():
        acts = output.cs[i]
        if acts is None:
            yield i, *_codebook_activations(sparsifier, output.outs[i])
        else:
            yield i, acts, acts > 0


def _codebook_activations(sparsifier: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    assert isinstance(sparsifier, Codebook), type(sparsifier)
    return sparsifier.similarities(x), sparsifier.chosen(x)


def _summary(layers: dict[str, LayerMaxActs], config: MaxActConfig, source: str, n_images: int) -> dict[str, Any]:
    return {
        "model": str(config.infer.model_name),
        "data": source,
        "split": config.infer.split,
        "n_images": n_images,
        "layers": {
            i: {
                "n_elements": len(layer.firing_frequency),
                "n_dead": layer.n_dead,
                "mean_n_active": layer.firing_frequency.sum().item(),
            }
            for i, layer in layers.items()
        },
    }


def _draw(path: Path, title: str, layer: LayerMaxActs, images: Images, data: ImageData, n_shown: int) -> None:
    """Draws the most often active elements, one row each: their strongest images, activations above them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    frequencies, elements = layer.firing_frequency.sort(descending=True, stable=True)
    n_rows = min(n_shown, max(1, int((frequencies > 0).sum())))
    n_columns = layer.top_acts.shape[1]
    figure = Figure(figsize=(1.6 + 0.8 * n_columns, 0.6 + 0.95 * n_rows), layout="constrained")
    figure.suptitle(f"{title}\nthe most often active elements, their strongest images, activation above", fontsize=9)
    grid: Any = figure.subplots(n_rows, n_columns, squeeze=False)
    for row, element, frequency in zip(grid, elements.tolist(), frequencies.tolist(), strict=False):
        for axes, act, number in zip(row, layer.top_acts[element], layer.top_images[element], strict=True):
            axes.set(xticks=[], yticks=[])
            if number < 0:
                axes.set_visible(False)
                continue
            axes.imshow(images.pixels[number].reshape(data.height_width).numpy(), cmap="gray_r", vmin=0, vmax=1)
            axes.set_title(f"{act.item():.2f}", fontsize=7, pad=2)
        row[0].set_ylabel(f"{element}\n{frequency:.1%}", fontsize=7, rotation=0, ha="right", va="center")
    canvas = FigureCanvasAgg(figure)
    with new_file(path) as temporary:
        canvas.print_figure(temporary, format="png", dpi=120)
