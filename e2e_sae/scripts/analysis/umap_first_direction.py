"""The UMAP of two dictionaries, coloured by cosine with the first principal direction (fig. 21).

python -m e2e_sae.scripts.analysis.umap_first_direction RUNS --out DIR
"""

from e2e_sae.scripts.analysis.analyse import main

if __name__ == "__main__":
    main("umap_first_direction")
