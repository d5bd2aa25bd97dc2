"""Process 1 of a container: starts the service under a random process id and waits for it, as an init does.

CUDA refuses a memory handle of a process that has the same id as the reader, as if it were the reader's own handle. In
containers every service would be process 1, so a random number of ids is used up before the service starts.

    entrypoint.py COMMAND [ARGUMENT ...]
"""

from __future__ import annotations

import _thread
import os
import random
import signal
import sys

# About 40 us per id. One pair of processes in this number still has equal ids: its rows go through shared memory.
_MAX_SPENT_IDS = 8_000
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_NOT_FOUND, _NOT_EXECUTABLE = 127, 126  # exit codes, as shells give them


def spend_process_ids(count: int) -> None:
    """Uses up process ids by starting threads, whose ids come from the same numbers at a tenth of the cost."""
    done = _thread.allocate_lock()
    done.acquire()
    for _ in range(count):
        _thread.start_new_thread(done.release, ())
        done.acquire()


def run(command: list[str], num_spent_ids: int) -> int:
    """Runs a command until it ends; forwards signals to it and reaps orphaned processes.

    Returns:
        the exit code, or 128 plus the number of the signal that ended it.

    Raises:
        OSError: the command cannot be started.
    """
    # Signals are blocked until sigwait, so that none is lost before the command runs; the command starts unblocked.
    awaited = {*_FORWARDED, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    spend_process_ids(num_spent_ids)
    # Python ignores SIGPIPE, and the parent process may ignore others; the command must get the default handlers.
    child = os.posix_spawnp(command[0], command, os.environ, setsigmask=(), setsigdef=(signal.SIGPIPE, *_FORWARDED))
    while True:
        received = signal.sigwait(awaited)
        if received != signal.SIGCHLD:
            os.kill(child, received)
            continue
        # One SIGCHLD may stand for several processes; orphans become children of process 1.
        ended = -1
        while ended:
            ended, status = os.waitpid(-1, os.WNOHANG)
            if ended == child:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code


def main() -> int:
    command = sys.argv[1:]
    if not command:
        print("nothing to start: usage: entrypoint.py COMMAND [ARGUMENT ...]", file=sys.stderr)
        return 2
    try:
        return run(command, random.randint(1, _MAX_SPENT_IDS))
    except OSError as error:
        print(f"cannot start {command[0]!r}: {error.strerror}", file=sys.stderr)
        return _NOT_FOUND if isinstance(error, FileNotFoundError) else _NOT_EXECUTABLE


if __name__ == "__main__":
    sys.exit(main())
