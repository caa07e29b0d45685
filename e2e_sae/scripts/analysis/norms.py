"""Norms of the SAEs' inputs and outputs (fig. 10, table 5).

python -m e2e_sae.scripts.analysis.norms RUNS --out DIR
"""

from e2e_sae.scripts.analysis.analyse import main

if __name__ == "__main__":
    main("norms")
