"""Cosines of decoder directions with those of the local run: nearest, and one to one (figs. 3c and 8).

python -m e2e_sae.scripts.analysis.cross_type_similarity RUNS --out DIR
"""

from e2e_sae.scripts.analysis.analyse import main

if __name__ == "__main__":
    main("cross_type_similarity")
