"""The paper's library's functions, as thin layers over ours: their names, arguments and meaning, our arithmetic.

Nothing of ours imports this package. Users reach it by that library's own paths (`e2e_sae.losses.calc_loss`,
`e2e_sae.loader.load_tlens_model`, ...); `tests/test_legacy_api.py` lists them all.
"""
