"""How this package speaks to the `wandb` package: quietly, without questions, and never longer than it promised."""

import contextlib
import threading
from collections.abc import Callable
from typing import Any


def quiet_wandb() -> Any:
    """Returns the `wandb` module, set up so that it prints nothing and never asks for a key.

    Raises:
        wandb_errors: its settings (environment, files) are invalid.
    """
    import wandb

    wandb.setup()
    wandb.termsetup(wandb.Settings(silent=True), None)
    return wandb


def wandb_errors() -> tuple[type[Exception], ...]:
    """Returns what the `wandb` package raises when its server, its service process or its settings fail it."""
    import wandb
    from pydantic import ValidationError
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError
    from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

    # OSError: the network, the disk, and the connection to a service process that is gone.
    own = (wandb.Error, WandbApiFailedError, HandleAbandonedError, MailboxClosedError)
    return (*own, OSError, ValidationError)


def end_wandb_service() -> None:
    """Kills wandb's service process, which would otherwise hold up the end of ours while it tries to reach a server.

    There is no public way: `wandb.teardown()` waits as well. Where a version keeps the process elsewhere, nothing
    happens and the end takes as long as wandb wants.
    """
    from wandb.sdk import wandb_setup
    from wandb.sdk.lib.service import service_token

    with contextlib.suppress(AttributeError):
        session: Any = wandb_setup.singleton()
        connection = session._connection
        if connection is None or connection._proc is None:
            return
        connection._cleanup()  # its atexit hook
        connection._proc._process.kill()
        connection._proc._process.wait()
        # What comes next starts a new one. The threads that spoke to the old one are daemons and end with us.
        service_token.clear_service_in_env()
        wandb_setup._singleton = None


def ends_within(seconds: int, call: Callable[[], object]) -> bool:
    """Runs a call in a thread of its own and says whether it came back in time."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()
