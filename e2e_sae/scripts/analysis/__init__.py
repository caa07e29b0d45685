"""One short script for each analysis, and `e2e-sae analyse` for all of them."""
