"""Several server processes on one port, and their supervisor.

The workers are separate Python processes, started anew and never forked: gRPC, onnxruntime and OpenMP do
not survive a fork. Each opens the port with ``SO_REUSEPORT``, so the kernel spreads connections, and maps
the same index files, so their memory is shared. A worker that dies is started again; when the supervisor
dies, even by SIGKILL, its end of each worker's pipe closes and the worker drains and ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from retrieval_kd.errors import RkdError, ServeError
from serve.config import LOOPBACK, ServeConfig
from serve.logs import use_json

_log = logging.getLogger(__name__)
_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 30.0
_HEALTHY_SECONDS = 60.0
_TICK = 0.2
_KILL_GRACE = 5.0
_READY = b"\0"  # in no error's text
_PIPE_BYTES = 65536
_PR_SET_PDEATHSIG = 1


@dataclass
class _Worker:
    """One place among the workers and the process that fills it.

    Attributes:
        number: Its place, from 0.
        process: The process; its standard input is the pipe that closes with the supervisor.
        started: When the process was started, ``time.monotonic``.
        ready: Whether it has answered that it serves.
        words: What else it has said on its standard output: why it cannot serve.
        pause: Seconds to wait before it is started again.
        start_at: When to start it again; None while it runs.
    """

    number: int
    process: subprocess.Popen[bytes]
    started: float
    ready: bool = False
    words: bytes = b""
    pause: float = _FIRST_PAUSE
    start_at: float | None = None


@dataclass
class _Supervisor:
    config: ServeConfig
    environment: dict[str, str]
    workers: list[_Worker] = field(default_factory=list)
    served: bool = False
    stopping: bool = False

    def start(self) -> None:
        for number in range(self.config.workers):
            self.workers.append(_Worker(number, self._spawn(), time.monotonic()))

    def _spawn(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "serve.workers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self.environment,
        )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(self.config.to_json().encode() + b"\n")
            process.stdin.flush()
        return process

    def signal(self, name: signal.Signals) -> None:
        for worker in self.workers:
            # SIGHUP ends a process that does not handle it yet, and one that loads will see the newest version anyway.
            if worker.process.poll() is None and (worker.ready or name is not signal.SIGHUP):
                worker.process.send_signal(name)

    def tick(self) -> None:
        """Look after each worker once: note that it is ready, start it again if it died."""
        self._read_ready()
        for worker in self.workers:
            if worker.process.poll() is None:
                continue
            if worker.start_at is None:
                self._died(worker)
            elif time.monotonic() >= worker.start_at:
                worker.process, worker.started, worker.start_at = self._spawn(), time.monotonic(), None
                worker.ready, worker.words = False, b""

    def _died(self, worker: _Worker) -> None:
        code = worker.process.returncode
        assert worker.process.stdout is not None
        words = (worker.words + worker.process.stdout.read()).decode(errors="replace")
        _close_pipes(worker.process)
        if not self.served:
            # What keeps one from serving keeps the others: said here, it is said once.
            if words:
                raise ServeError(words)
            raise ServeError(f"worker {worker.number} ended with {code} before it served; its own message is above")
        if time.monotonic() - worker.started > _HEALTHY_SECONDS:
            worker.pause = _FIRST_PAUSE
        why = f" ({words})" if words else ""
        _log.error("worker %d (pid %d) ended with %d%s; starting it again in %.1f s",
                   worker.number, worker.process.pid, code, why, worker.pause)  # fmt: skip
        worker.start_at = time.monotonic() + worker.pause
        worker.pause = min(2 * worker.pause, _LONGEST_PAUSE)
        _forget_metrics(self.environment, worker.process.pid)

    def _read_ready(self) -> None:
        with selectors.DefaultSelector() as selector:
            for worker in self.workers:
                if not worker.ready and worker.process.stdout is not None and not worker.process.stdout.closed:
                    selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            if not selector.get_map():
                time.sleep(_TICK)
                return
            for key, _ in selector.select(_TICK):
                said = os.read(key.fd, _PIPE_BYTES)
                key.data.ready = _READY in said
                self.served |= key.data.ready
                key.data.words += said.replace(_READY, b"")
                if not key.data.ready:
                    # It said why it ends, or closed its output by dying; poll() sees that in a moment.
                    time.sleep(0.01)

    def stop(self) -> None:
        """Let every worker drain, and kill those that take too long."""
        self.signal(signal.SIGTERM)
        give_up = time.monotonic() + self.config.drain_delay + self.config.drain_seconds + _KILL_GRACE
        for worker in self.workers:
            try:
                worker.process.wait(max(0.0, give_up - time.monotonic()))
            except subprocess.TimeoutExpired:
                _log.error("worker %d did not stop in time; killing it", worker.number)
                worker.process.kill()
                worker.process.wait()
            _close_pipes(worker.process)


def run_workers(config: ServeConfig, on_ready: Callable[[int], None] | None = None) -> None:
    """Run ``config.workers`` server processes until SIGTERM or SIGINT, and pass SIGHUP on to them.

    Args:
        config: How to run.
        on_ready: Called with the port once every worker answers requests.

    Raises:
        ServeError: the port cannot be opened, or no worker could begin to serve.
    """
    if config.json_logs:
        use_json()
    config.require_safe_addresses()
    cores = os.cpu_count() or 1
    threads = config.threads or max(1, cores // config.workers)
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(_reserved_port(config.host, config.port))
        admin_port = config.admin_port
        if admin_port is not None:
            admin_port = stack.enter_context(_reserved_port(LOOPBACK, admin_port))
        environment = dict(os.environ)
        if config.metrics_port is not None:
            folder = tempfile.mkdtemp(prefix="rkd-metrics-")
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            environment["PROMETHEUS_MULTIPROC_DIR"] = folder
            # Not at the top: where prometheus_client keeps its values is decided at its import.
            from serve.metrics import merged_registry, serve_metrics

            stack.enter_context(serve_metrics(merged_registry(folder), config.metrics_host, config.metrics_port))
        shared = replace(config, port=port, admin_port=admin_port, threads=threads, reuse_port=True)
        supervisor = _Supervisor(shared, environment)

        def stop(number: int, frame: object) -> None:
            supervisor.stopping = True

        def reload(number: int, frame: object) -> None:
            supervisor.signal(signal.SIGHUP)

        for name, handler in ((signal.SIGTERM, stop), (signal.SIGINT, stop), (signal.SIGHUP, reload)):
            stack.callback(signal.signal, name, signal.signal(name, handler))
        try:
            supervisor.start()
            announced = False
            while not supervisor.stopping:
                supervisor.tick()
                if not announced and all(worker.ready for worker in supervisor.workers):
                    announced = True
                    if on_ready is not None:
                        on_ready(port)
        finally:
            supervisor.stop()


@contextlib.contextmanager
def _reserved_port(host: str, port: int) -> Iterator[int]:
    """Make sure that nobody else has the port, and keep it while workers come and go.

    A socket that is bound and does not listen gets no connections, but nobody without ``SO_REUSEPORT`` can
    take its port.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as reserved:
        try:
            # Without SO_REUSEPORT this one fails where any other socket has the port.
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
                port = probe.getsockname()[1]
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            reserved.bind((host, port))
        except OSError as error:
            raise ServeError(
                f"cannot listen on {host}:{port}: the port is taken or the address is not this machine's "
                f"({error.strerror}); give another one"
            ) from None
        yield port


def _forget_metrics(environment: dict[str, str], pid: int) -> None:
    """Drop the gauges of a worker that died; its counters stay in the sum."""
    folder = environment.get("PROMETHEUS_MULTIPROC_DIR")
    if folder is not None:
        for path in Path(folder).glob(f"gauge_live*_{pid}.db"):
            path.unlink(missing_ok=True)


def _close_pipes(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def main() -> None:
    """Be a worker: read the configuration from the pipe on standard input, and end when the pipe closes."""
    _die_with_parent()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("serve").setLevel(logging.INFO)
    config = ServeConfig.from_json(sys.stdin.readline())
    threading.Thread(target=_end_with_pipe, args=(config,), daemon=True).start()
    # Not at the top: the variable that makes prometheus_client share its values is this process' own.
    from serve.server import run_server

    def ready(port: int) -> None:
        os.write(sys.stdout.fileno(), _READY)

    try:
        run_server(config, ready)
    except RkdError as error:
        os.write(sys.stdout.fileno(), str(error).encode(errors="backslashreplace")[:_PIPE_BYTES])
        raise SystemExit(1) from None


def _end_with_pipe(config: ServeConfig) -> None:
    """Wait for the supervisor's end, then stop as SIGTERM would, and at the latest when draining is over."""
    while os.read(sys.stdin.fileno(), 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(config.drain_delay + config.drain_seconds + _KILL_GRACE)
    os._exit(1)


def _die_with_parent() -> None:
    """Ask Linux for SIGTERM when the supervisor dies: it comes even while this process is still importing."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    main()
