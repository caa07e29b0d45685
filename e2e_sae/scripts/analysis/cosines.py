"""Cosines of the SAEs' inputs and outputs (fig. 11).

python -m e2e_sae.scripts.analysis.cosines RUNS --out DIR
"""

from e2e_sae.scripts.analysis.analyse import main

if __name__ == "__main__":
    main("cosines")
