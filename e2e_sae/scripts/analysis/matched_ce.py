"""Runs of each kind with the same CE increase (tables 1 and 2).

python -m e2e_sae.scripts.analysis.matched_ce RUNS --out DIR
"""

from e2e_sae.scripts.analysis.analyse import main

if __name__ == "__main__":
    main("matched_ce")
