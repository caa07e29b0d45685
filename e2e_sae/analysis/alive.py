"""Which latents of an SAE are alive: were active at least once over some tokens.

As the run's last evaluation counted them (`firing.safetensors` of its checkpoint); else over the study's rows of its
evaluation data, the SAE alone on clean activations; else as the run counted them in training, maybe long ago. The
paper's figures of directions (arXiv 2405.12241, section 3.3) are of alive ones.
"""

from functools import cache

from jaxtyping import Bool, Int
from torch import Tensor

from e2e_sae.analysis.activities import activities
from e2e_sae.analysis.study import Study
from e2e_sae.checkpoint.files import read_tensors
from e2e_sae.checkpoint.records import HELD_OUT, StoredRun
from e2e_sae.checkpoint.run_dir import read_checkpoint_info
from e2e_sae.errors import UserError
from e2e_sae.log import logger

FIRING_FILE = "firing.safetensors"
"""In a checkpoint: counts by position."""


def alive(study: Study, run_id: str, position: str) -> Bool[Tensor, " d_sae"]:
    """Returns which latents are alive; all of them, with a warning, where neither counts nor data are to be had.

    Args:
        study: the runs.
        run_id: the run.
        position: name of the SAE's position.
    """
    run = study.stored(run_id)
    counts, is_evaluated = _counted_by_run(run, position)
    if counts is not None and is_evaluated:
        return counts > 0
    try:
        found, _ = activities(study, run_id, [position], "alive latents")
        return found[position].n_active > 0
    except UserError as reason:
        why = str(reason).splitlines()[0]
    if counts is not None:
        _warn_once(f"'{run.source}': alive latents are those that fired in training; counting them anew failed: {why}")
        return counts > 0
    d_sae = run.saes[position].info.d_sae
    _warn_once(
        f"'{run.source}': which latents are alive is not known, so all {d_sae} count as alive. It has no counts of "
        f"firing, and counting failed: {why}"
    )
    return run.saes[position].tensors["W_dec"].new_ones(d_sae).bool()


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _counted_by_run(run: StoredRun, position: str) -> tuple[Int[Tensor, " d_sae"] | None, bool]:
    """Returns the counts of a run's checkpoint, None without, and whether they are of an evaluation."""
    file = run.source / FIRING_FILE
    if not file.is_file():
        return None, False
    info = read_checkpoint_info(run.source, check=False)
    return read_tensors(file).get(position) if info.firing_n_tokens else None, info.firing_data == HELD_OUT
