"""Blocks of cosines against all cosines at once, and one-to-one pairs against every assignment there is."""

from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from e2e_sae.analysis import similarity
from e2e_sae.analysis.similarity import (
    Pairs,
    nearest,
    nearest_both,
    nearest_others,
    one_to_one,
    unit_directions,
)


def directions(n: int, d: int = 6, seed: int = 0) -> Tensor:
    """Returns random rows of norm 1, in float64."""
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


@pytest.fixture(params=[(2**24, 64), (50, 2), (1, 2)])
def any_block_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All in one block, some rows in each, one row in each; without and with groups of columns."""
    monkeypatch.setattr(similarity, "BLOCK_SIZE", request.param[0])
    monkeypatch.setattr(similarity, "GROUP_SIZE", request.param[1])


@pytest.mark.usefixtures("any_block_size")
@pytest.mark.parametrize("k", [1, 3])
def test_nearest_directions_are_those_of_the_whole_matrix(k: int):
    A, B = directions(23, seed=0), directions(17, seed=1)
    expected = (A @ B.T).topk(k, dim=1)
    found = nearest(A, B, k)
    torch.testing.assert_close(found.cosines, expected.values)
    assert torch.equal(found.indices, expected.indices)


@pytest.mark.usefixtures("any_block_size")
@pytest.mark.parametrize("k", [1, 4])
def test_both_ways_at_once_is_each_way_alone(k: int):
    A, B = directions(23, seed=0), directions(17, seed=1)
    for found, expected in zip(nearest_both(A, B, k), (nearest(A, B, k), nearest(B, A, k)), strict=True):
        torch.testing.assert_close(found.cosines, expected.cosines)
        assert torch.equal(found.indices, expected.indices)


@pytest.mark.usefixtures("any_block_size")
@pytest.mark.parametrize("k", [1, 5])
def test_a_direction_is_not_its_own_neighbour(k: int):
    A = directions(23)
    expected = (A @ A.T - 3 * torch.eye(23, dtype=torch.float64)).topk(k, dim=1)
    found = nearest_others(A, k)
    torch.testing.assert_close(found.cosines, expected.values)
    assert torch.equal(found.indices, expected.indices)


def test_a_copy_of_a_direction_is_its_neighbour():
    A = directions(4)
    A = torch.cat([A, A[:1]])
    found = nearest_others(A)
    assert found.indices[[0, 4], 0].tolist() == [4, 0]
    torch.testing.assert_close(found.cosines[[0, 4], 0], torch.ones(2, dtype=torch.float64))


def test_there_are_as_many_neighbours_as_there_can_be():
    A, B = directions(3), directions(2, seed=1)
    assert nearest(A, B, 10).indices.sort(1).values.tolist() == [[0, 1]] * 3
    assert nearest_others(A, 10).indices.sort(1).values.tolist() == [[1, 2], [0, 2], [0, 1]]
    with pytest.raises(ValueError, match="neighbours were asked for where there are none: 0 of 1"):
        nearest_others(A[:1])
    with pytest.raises(ValueError, match="where there are none"):
        nearest(A, B, 0)


def test_directions_have_norm_1_whatever_the_decoder_and_zeros_stay():
    W_dec = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-2.0, 0.0]])
    expected = torch.tensor([[0.6, 0.8], [0.0, 0.0], [-1.0, 0.0]])
    torch.testing.assert_close(unit_directions(W_dec), expected)
    torch.testing.assert_close(unit_directions(W_dec.T.contiguous().T), expected)
    assert unit_directions(W_dec.bfloat16()).dtype == torch.float32
    assert unit_directions(W_dec.double()).dtype == torch.float64


def check_pairs(pairs: Pairs, A: Tensor, B: Tensor) -> float:
    """Checks that pairs use each direction at most once, and returns the sum of their cosines."""
    n = min(len(A), len(B))
    assert len(pairs.a) == len(pairs.b) == len(pairs.cosines) == n
    assert len(pairs.a.unique()) == len(pairs.b.unique()) == n
    assert torch.equal(pairs.a, pairs.a.sort().values)
    torch.testing.assert_close(pairs.cosines, (A[pairs.a] * B[pairs.b]).sum(1))
    return float(pairs.cosines.sum())


@pytest.mark.parametrize(("n_a", "n_b"), [(5, 5), (4, 6), (6, 4)])
def test_pairs_have_the_largest_sum_of_all_assignments(n_a: int, n_b: int):
    A, B = directions(n_a, seed=0), directions(n_b, seed=1)
    cosines = A @ B.T if n_a <= n_b else B @ A.T
    n, m = cosines.shape
    best = max(sum(float(cosines[i, j]) for i, j in enumerate(order)) for order in permutations(range(m), n))
    assert check_pairs(one_to_one(A, B), A, B) == pytest.approx(best, rel=1e-12)


def test_the_largest_cosine_counts_double_and_one_to_one_does_not():
    # Two of A's are the same: both have B's first one as their nearest, and only one can have it.
    e = torch.eye(3)
    A, B = e[[0, 0]], e[[0, 1]]
    assert nearest(A, B).cosines[:, 0].tolist() == [1, 1]
    assert sorted(one_to_one(A, B).cosines.tolist()) == [0, 1]


@pytest.mark.parametrize(("n_a", "n_b"), [(60, 60), (40, 60), (60, 40)])
def test_without_room_for_all_cosines_pairs_are_as_good(n_a: int, n_b: int):
    A, B = directions(n_a, 24, seed=0), directions(n_b, 24, seed=1)
    exact = check_pairs(one_to_one(A, B), A, B)
    for max_exact in (200, 1):
        found = check_pairs(one_to_one(A, B, max_exact=max_exact), A, B)
        assert 0.995 * exact <= found <= exact + 1e-9


def test_candidates_are_assigned_exactly_and_what_is_left_over_is_assigned_later(monkeypatch: pytest.MonkeyPatch):
    # Ten of A's crowd round three of B's: with two candidates each, most are left over in the first round.
    monkeypatch.setattr(similarity, "N_CANDIDATES", 2)
    B = directions(20, 8, seed=1)
    crowd = F.normalize(B[torch.arange(10) % 3] + 0.05 * directions(10, 8, seed=2), dim=1)
    A = torch.cat([crowd, directions(10, 8, seed=3)])
    cosines = (A @ B.T).numpy()
    exact = cosines[linear_sum_assignment(cosines, maximize=True)].sum()
    found = check_pairs(one_to_one(A, B, max_exact=1), A, B)
    assert 0.85 * exact < found <= exact + 1e-9
    # The candidates of all pairs known: nothing is left over, and the assignment is the exact one.
    all_known = check_pairs(one_to_one(A, B, nearest_both(A, B, 20), max_exact=1), A, B)
    assert all_known == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("max_exact", [similarity.MAX_EXACT, 100])
def test_a_shuffled_dictionary_is_put_in_order_again(max_exact: int):
    A = directions(50, 24)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    found = one_to_one(A, A[order], max_exact=max_exact)
    assert torch.equal(order[found.b], torch.arange(50))
    torch.testing.assert_close(found.cosines, torch.ones(50, dtype=torch.float64))


def test_opposite_dictionaries_are_paired_all_the_same():
    e = torch.eye(1).expand(9, 1)
    found = one_to_one(e, -e, max_exact=4)
    check_pairs(found, e, -e)
    assert found.cosines.tolist() == [-1] * 9


@pytest.mark.gpu
def test_a_gpu_finds_what_the_cpu_finds():
    A, B = directions(300, 32, seed=0), directions(200, 32, seed=1)
    for one, other in zip(nearest_both(A.cuda(), B.cuda(), 3), nearest_both(A, B, 3), strict=True):
        torch.testing.assert_close(one.cosines.cpu(), other.cosines)
        assert torch.equal(one.indices.cpu(), other.indices)
    found = one_to_one(A.cuda(), B.cuda(), max_exact=1000)
    assert found.b.is_cuda
    assert torch.equal(found.b.cpu(), one_to_one(A, B, max_exact=1000).b)
