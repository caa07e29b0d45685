"""Types of run by their losses."""

from typing import Any

import pytest

from e2e_sae.losses import LossConfigs
from e2e_sae.run_types import COLOURS, MARKERS, run_type

LOCAL, KL = {"out_to_in": {"coeff": 1.0}}, {"logits_kl": {"coeff": 1.0}}
DS = {"in_to_orig": {"total_coeff": 2.0, "hook_positions": ["x"]}}
NO_KL, NO_LOCAL = {"logits_kl": {"coeff": 0.0}}, {"out_to_in": {"coeff": 0.0}}


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        (LOCAL, "local"),
        (LOCAL | NO_KL, "local"),
        ({}, "local"),
        (KL, "e2e"),
        (KL | NO_LOCAL, "e2e"),
        (KL | DS | NO_LOCAL, "e2e+ds"),
        (KL | LOCAL, "e2e+local"),
        (KL | DS | LOCAL, "e2e+ds+local"),
        (DS, "ds"),
    ],
)
def test_the_type_is_told_by_the_terms_that_train(terms: dict[str, Any], expected: str) -> None:
    assert run_type(LossConfigs.from_dict({"sparsity": {"coeff": 1.0}, **terms})) == expected


def test_the_papers_types_have_their_own_colours_and_markers() -> None:
    assert list(COLOURS) == list(MARKERS) == ["local", "e2e", "e2e+ds"]
    assert len(set(COLOURS.values())) == len(set(MARKERS.values())) == 3
