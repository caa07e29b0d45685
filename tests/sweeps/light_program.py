"""A program with the interface of `run_train_tlens_saes.py` that trains nothing: quick to start.

`PROGRAM config.yaml` makes a run folder in the config's save_dir, `PROGRAM --resume RUN_DIR` goes on in it; each start
is a line in `starts.txt`. By seed: 13 fails while a file `broken` lies beside the sweep folder's `runs`, 66 is killed
like a process that has eaten the memory, 99 goes on until it is told to end.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import yaml


def main() -> None:
    """Does all of that."""
    arguments = sys.argv[1:]
    if arguments[0] == "--resume":
        run = Path(arguments[1])
        seed = yaml.safe_load((run / "final_config.yaml").read_text())["seed"]
    else:
        config = yaml.safe_load(Path(arguments[0]).read_text())
        seed, run = config["seed"], Path(config["save_dir"]) / "run_1"
        run.mkdir()
        (run / "final_config.yaml").write_text(yaml.safe_dump(config))
    with (run / "starts.txt").open("a") as file:
        how = "resume" if arguments[0] == "--resume" else "config"
        file.write(f"{how} {os.environ.get('OMP_NUM_THREADS')} {'WANDB_SWEEP_ID' in os.environ}\n")
    sys.stdout.write(f"seed {seed}\n")
    sys.stdout.flush()
    if seed == 13 and (run.parents[2] / "broken").exists():
        sys.stderr.write("error: unlucky\n")
        sys.exit(1)
    if seed == 66:
        os.kill(os.getpid(), signal.SIGKILL)
    while seed == 99 and not (run.parents[2] / "enough").exists():
        time.sleep(0.02)
    position = "blocks.1.hook_resid_pre"
    summary = {
        "samples": 4,
        f"sparsity/L_0_final/{position}": 10.0 + seed,
        f"sparsity/alive_dict_elements_final/{position}": 20 + seed,
        f"quality/eval/explained_variance/{position}": 0.5,
        "performance/eval/ce_increase": 0.5 / (1 + seed),
        "loss/eval/logits_kl": 0.25,
    }
    (run / "summary.json").write_text(json.dumps(summary))


if __name__ == "__main__":
    main()
