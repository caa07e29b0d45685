"""Cosines of decoder directions with those of another seed: nearest, and one to one (fig. 3b).

python -m e2e_sae.scripts.analysis.cross_seed_similarity RUNS --out DIR
"""

from e2e_sae.scripts.analysis.analyse import main

if __name__ == "__main__":
    main("cross_seed_similarity")
