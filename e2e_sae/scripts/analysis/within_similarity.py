"""Cosines of decoder directions with the nearest other one of the same dictionary (fig. 3a).

python -m e2e_sae.scripts.analysis.within_similarity RUNS --out DIR
"""

from e2e_sae.scripts.analysis.analyse import main

if __name__ == "__main__":
    main("within_similarity")
