"""One `wandb agent` per GPU.

`python run_wandb_sweep.py <agent_id> [0,1,3]`, with the id that `wandb sweep` printed (`entity/project/sweep_id`).
Each agent sees one GPU and writes `sweep_<sweep_id>_gpu<i>.log`; Ctrl-C ends all of them, and their runs.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from e2e_sae.errors import RunFailed, UserError
from e2e_sae.settings import load_env_file

_GRACE_S = 60
"""For runs to save themselves when they are asked to stop; then they are killed."""


def run_agents(agent_id: str, gpus: Sequence[int] | None = None, log_dir: Path = Path(".")) -> None:
    """Runs agents until the sweep is done.

    Args:
        agent_id: `entity/project/sweep_id`, `project/sweep_id`, or `sweep_id`.
        gpus: which GPUs; None: all there are, or one agent without any.
        log_dir: where each agent's output goes.

    Raises:
        UserError: a GPU that is not there, or a malformed id.
        RunFailed: an agent failed.
    """
    if not re.fullmatch(r"[\w.-]+(?:/[\w .-]+){0,2}", agent_id):
        raise UserError(f"'{agent_id}' is no agent id: expected what `wandb sweep` printed, 'entity/project/sweep_id'")
    load_env_file()
    agents: dict[Path, subprocess.Popen[bytes]] = {}
    try:
        for gpu in _checked(gpus):
            name = f"sweep_{agent_id.rpartition('/')[2]}{'' if gpu is None else f'_gpu{gpu}'}.log"
            agents[log_dir / name] = _start(agent_id, gpu, log_dir / name)
            print(f"agent on {'the CPU' if gpu is None else f'GPU {gpu}'}: log in {log_dir / name}", flush=True)
        for agent in agents.values():
            agent.wait()
    finally:
        _end(agents.values())
    failed = [str(log) for log, agent in agents.items() if agent.returncode]
    if failed:
        raise RunFailed(f"{len(failed)} of {len(agents)} agents failed: see {', '.join(failed)}")


def _start(agent_id: str, gpu: int | None, log: Path) -> subprocess.Popen[bytes]:
    environment = dict(os.environ) if gpu is None else {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)}
    # The sweep's command says `python`: it is to be this one.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    command = [sys.executable, "-m", "wandb", "agent", "--forward-signals", agent_id]
    with log.open("ab") as out:
        # A session of its own: Ctrl-C in the terminal comes to us alone, and we hand it on once.
        return subprocess.Popen(
            command, env=environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
        )


def _end(agents: Iterable[subprocess.Popen[bytes]]) -> None:
    running = [agent for agent in agents if agent.poll() is None]
    for agent in running:
        agent.send_signal(signal.SIGINT)
    for agent in running:
        try:
            agent.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            os.killpg(agent.pid, signal.SIGKILL)


def _checked(gpus: Sequence[int] | None) -> Sequence[int | None]:
    import torch

    n = torch.cuda.device_count()
    if gpus is None:
        return list(range(n)) or [None]
    missing = [gpu for gpu in gpus if gpu >= n]
    if missing:
        raise UserError(f"no GPU {missing}: this machine has {n}")
    return list(gpus)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    from e2e_sae.log import log_to_console
    from e2e_sae.scripts.exit_codes import run_command

    parser = argparse.ArgumentParser(description="One `wandb agent` per GPU.")
    parser.add_argument("agent_id", help="entity/project/sweep_id, as `wandb sweep` printed it")
    parser.add_argument("gpus", nargs="?", type=_gpu_list, help="such as 0,1,3 (default: all)")
    args = parser.parse_args(argv)
    log_to_console()
    return run_command(lambda: run_agents(args.agent_id, args.gpus), debug=False)


def _gpu_list(text: str) -> list[int]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"'{text}' is no list of GPUs: expected such as 0,1,3")
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    raise SystemExit(main())
