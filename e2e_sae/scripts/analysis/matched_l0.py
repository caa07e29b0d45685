"""Runs of each kind with the same L0 (table 3).

python -m e2e_sae.scripts.analysis.matched_l0 RUNS --out DIR
"""

from e2e_sae.scripts.analysis.analyse import main

if __name__ == "__main__":
    main("matched_l0")
