"""CE increase against L0 and alive elements (figs. 1, 4 and 5).

python -m e2e_sae.scripts.analysis.pareto RUNS --out DIR
"""

from e2e_sae.scripts.analysis.analyse import main

if __name__ == "__main__":
    main("pareto")
