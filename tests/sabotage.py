"""Kill a piece of work at each of its changes of the disk; run in a process of its own, because it forks."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

_CHANGES = frozenset({"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate"})
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def killed_at(operation: int, work: Callable[[], object]) -> bool:
    """Run ``work`` in a child that SIGKILLs itself before its n-th change of the disk; False if it makes fewer."""
    child = os.fork()
    if child == 0:
        seen = 0

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal seen
            # Between two changes the disk is the same, so reading is no place of its own to die at.
            if event in _CHANGES or (event == "open" and int(arguments[2]) & _WRITES):  # type: ignore[call-overload]
                seen += 1
                if seen == operation:
                    os.kill(os.getpid(), signal.SIGKILL)

        status = 1
        try:
            sys.addaudithook(hook)
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the work failed without being killed"
    return False
