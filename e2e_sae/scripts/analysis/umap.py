"""Decoder directions of two runs in a plane, and its regions with what they are about (figs. 19 and 20).

python -m e2e_sae.scripts.analysis.umap RUNS --out DIR
"""

from e2e_sae.scripts.analysis.analyse import main

if __name__ == "__main__":
    main("umap")
