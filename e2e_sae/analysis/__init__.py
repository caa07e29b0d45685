"""The paper's figures and tables, and more, from anyone's runs: a table of runs, what is measured on their SAEs, and
how it is drawn. `items.py` lists everything that there is.
"""
