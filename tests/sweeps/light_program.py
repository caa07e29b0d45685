"""A program with the interface of `run_train_tlens_saes.py` that trains nothing: quick to start.

`PROGRAM config.yaml` makes a run folder in the config's save_dir (with `members`, in each one's), `PROGRAM --resume
RUN_DIR...` goes on in it; each start is a line in `starts.txt`. By seed: 13 fails while a file `broken` lies beside the
sweep folder's `runs`, 66 is killed like a process that has eaten the memory, 99 goes on until it is told to end.
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
        runs = [Path(argument) for argument in arguments[1:]]
    else:
        config = yaml.safe_load(Path(arguments[0]).read_text())
        runs = [begin({**config, **member}) for member in config.get("members") or [{}]]
    how = "resume" if arguments[0] == "--resume" else "config"
    failed: list[str] = []
    for n, run in enumerate(runs, start=1):
        with (run / "starts.txt").open("a") as file:
            file.write(f"{how} {os.environ.get('OMP_NUM_THREADS')} {'WANDB_SWEEP_ID' in os.environ}\n")
        if not train(run):
            failed.append(f"member {n} of {len(runs)}, run: unlucky")
    if failed:
        several = [f"{len(failed)} of {len(runs)} members failed", *failed]
        sys.stderr.write("error: " + ("\n  ".join(several) if len(runs) > 1 else "unlucky") + "\n")
        sys.exit(1)


def begin(config: dict[str, str]) -> Path:
    """Returns a new run folder."""
    run = Path(config["save_dir"]) / "run_1"
    run.mkdir()
    (run / "final_config.yaml").write_text(yaml.safe_dump({k: v for k, v in config.items() if k != "members"}))
    return run


def train(run: Path) -> bool:
    """Finishes the run, and returns whether it did."""
    seed = yaml.safe_load((run / "final_config.yaml").read_text())["seed"]
    sys.stdout.write(f"seed {seed}\n")
    sys.stdout.flush()
    if seed == 13 and (run.parents[2] / "broken").exists():
        return False
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
    return True


if __name__ == "__main__":
    main()
