"""CE increase at the same L0, and L0 at the same CE increase, read off the frontiers.

python -m e2e_sae.scripts.analysis.interpolated RUNS --out DIR
"""

from e2e_sae.scripts.analysis.analyse import main

if __name__ == "__main__":
    main("interpolated")
