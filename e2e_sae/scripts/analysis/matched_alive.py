"""Runs of each kind with as many alive elements.

python -m e2e_sae.scripts.analysis.matched_alive RUNS --out DIR
"""

from e2e_sae.scripts.analysis.analyse import main

if __name__ == "__main__":
    main("matched_alive")
