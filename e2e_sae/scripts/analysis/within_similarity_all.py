"""Cosines of decoder directions within dictionaries against L0, CE increase and alive latents (fig. 7).

python -m e2e_sae.scripts.analysis.within_similarity_all RUNS --out DIR
"""

from e2e_sae.scripts.analysis.analyse import main

if __name__ == "__main__":
    main("within_similarity_all")
