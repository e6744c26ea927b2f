"""`python -m concat_cli.launch --nproc-per-node 8 train-con ...`: torchrun, brief where it fails.

It takes torchrun's options, then a command of `concat` with its own. `torchrun -m concat_cli` does
the same, but says some forty lines of its own, whatever its processes have said.
"""

from __future__ import annotations

import logging
import os
import signal
import sys

from concat_cli.console import LAUNCHED, show_error
from concat_cli.core.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Starts the processes; the exit code is that of the one that failed first, 1 for a killed
    one."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    args = run.parse_args(["-m", *(sys.argv[1:] if argv is None else argv)])
    args.training_script_args = [args.training_script, *args.training_script_args]
    args.training_script = "concat_cli"
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ[LAUNCHED] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, which says so in three lines
    try:
        run.run(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            show_error(
                UserError(
                    f"Process {rank} was ended by {name}, and the others with it.",
                    "The same command goes on from the last saved step. SIGKILL often means that "
                    "memory ran out.",
                )
            )
        return max(1, failure.exitcode)
    except SignalException as stop:
        return 128 + int(stop.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main())
