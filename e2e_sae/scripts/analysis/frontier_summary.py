"""Share of local SAEs' CE increase at the same L0 and alive elements (section 3.1).

python -m e2e_sae.scripts.analysis.frontier_summary RUNS --out DIR
"""

from e2e_sae.scripts.analysis.analyse import main

if __name__ == "__main__":
    main("frontier_summary")
