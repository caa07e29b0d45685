"""Products with matrices that are mostly 0, over the entries that are not; on a CPU.

What a sparse matrix makes of a dense one is a weighted sum of some of its rows, which `torch.embedding_bag` computes
faster than torch's sparse types do. Its other product here, of two dense matrices where a sparse one has entries,
is quickest in the order in which the larger of the two is read once: hence `transposed`.

Shapes: R rows, C columns, n entries.
"""

import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int32, Int64
from torch import Tensor

MAX_DENSITY, MAX_DENSITY_PER_WIDTH = 0.12, 1 / 2560
"""Share of active latents up to which an SAE's forward and backward pass take less time over the active entries than as
whole products, on a CPU: this, but at most so much x d_in, since a narrow product has less to skip. Found with
`python -m benchmarks.decode`: equal at 0.04, 0.05, 0.13 for widths 64, 128, 768 (0.25 for 768 with MKL's products)."""
MIN_LATENTS = 2**18
"""Tokens x latents below which the fixed cost of the sparse products outweighs what they save: likewise."""
ROWS_PER_LOOK = 16
"""The density is measured on one row of so many."""


def is_sparse_faster(latents: Float[Tensor, "R C"], d_in: int) -> bool:
    """Returns whether products of these latents with width `d_in` are faster over their entries.

    Depends on nothing but its arguments. Measured on CPUs in float32, so False elsewhere: to look would mean to wait
    for the device.
    """
    if latents.device.type != "cpu" or latents.dtype not in (torch.float32, torch.float64):
        return False
    look = latents[::ROWS_PER_LOOK]
    max_density = min(MAX_DENSITY, MAX_DENSITY_PER_WIDTH * d_in)
    return latents.numel() >= MIN_LATENTS and int(look.count_nonzero()) <= max_density * look.numel()


class Entries(NamedTuple):
    """Where a matrix [R, C] is not 0, in compressed rows."""

    starts: Int32[Tensor, " starts"]
    """Where each row's entries start, and the end of the last."""
    rows: Int32[Tensor, " n"]
    """Row of each entry; ascending."""
    columns: Int32[Tensor, " n"]
    """Column of each entry; ascending within a row."""

    @classmethod
    def of(cls, matrix: Float[Tensor, "R C"]) -> "Entries":
        """Finds them."""
        flat = matrix.reshape(-1).nonzero().squeeze(1)
        rows = flat // matrix.shape[1]
        columns = flat - rows * matrix.shape[1]
        return cls(_starts(rows.int(), len(matrix)), rows.int(), columns.int())

    def transposed(self, n_columns: int) -> tuple["Entries", Int64[Tensor, " n"]]:
        """Returns the entries of the transposed matrix [C, R], and which of these each of them is."""
        rows, order = self.columns.sort(stable=True)
        return Entries(_starts(rows, n_columns), rows, self.rows[order]), order

    def values(self, matrix: Float[Tensor, "R C"]) -> Float[Tensor, " n"]:
        """Returns a matrix's values there."""
        return matrix[self.rows, self.columns]

    def weighted_sums(self, weights: Float[Tensor, " n"], table: Float[Tensor, "C d"]) -> Float[Tensor, "R d"]:
        """Returns sum_c weights_rc table_c for every row r."""
        return F.embedding_bag(
            self.columns, table, self.starts, mode="sum", per_sample_weights=weights, include_last_offset=True
        )

    def row_sums(self, weights: Float[Tensor, " n"]) -> Float[Tensor, " R"]:
        """Returns sum_c weights_rc for every row r."""
        return weights.new_zeros(len(self.starts) - 1).index_add_(0, self.rows, weights)

    def dots(self, a: Float[Tensor, "R d"], b: Float[Tensor, "C d"]) -> Float[Tensor, " n"]:
        """Returns a_r . b_c for every entry (r, c)."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta", category=UserWarning)
            zeros = a.new_zeros(len(self.rows))  # not empty: what is there is added, times 0, and may be NaN
            size = len(a), len(b)
            where = torch.sparse_csr_tensor(self.starts, self.columns, zeros, size, check_invariants=False)
            return torch.sparse.sampled_addmm(where, a, b.T).values()


def _starts(rows: Int[Tensor, " n"], n_rows: int) -> Int32[Tensor, " starts"]:
    return torch.searchsorted(rows, torch.arange(n_rows + 1, dtype=rows.dtype), out_int32=True)
