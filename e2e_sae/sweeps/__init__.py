"""Local sweeps: the file that `wandb sweep` takes, run without W&B (`e2e-sae sweep`).

sweep_file.py   the file, its base config, its program
parameters.py   one varied setting: which values it takes
search.py       grid, random, bayes: which combination comes next
plan.py         a combination merged into the base config: one run, validated and identified
run_folder.py   what is left of a run on disk, and hence what is to be done
groups.py       which runs train together (`--shared`)
child.py        the process that a run trains in
run.py          starts the processes, looks after them
report.py       the table and the figure
"""
