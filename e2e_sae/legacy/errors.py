"""What these functions raise where the paper's library had an `assert`."""

from e2e_sae.errors import UserError


class LegacyAssertion(UserError, AssertionError):
    """A user's mistake that code written for the paper's library expects as an `AssertionError`."""
