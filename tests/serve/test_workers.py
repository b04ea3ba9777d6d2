"""Several processes on one port: they share the calls, are replaced when they die, and die with their parent."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny import tiny_encoder

from index.build import build_index
from retrieval_kd.encoders.corpus import EncodedCorpus, encode_texts
from retrieval_kd.encoders.onnx import OnnxEncoder
from retrieval_kd.errors import ServeError
from retrieval_kd.export.onnx_export import export_encoder
from retrieval_kd.export.parity import Probes
from retrieval_kd.recipes.schema import ExportSpec, IndexSpec
from serve.client import RetrievalClient
from serve.config import ServeConfig
from serve.limits import Limits
from serve.tls import CertificateFiles
from serve.workers import _Supervisor, _Worker, run_workers

ROOT = Path(__file__).resolve().parents[2]
StartWorkers = Callable[..., tuple[subprocess.Popen[str], int]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder, exported, and an index of twenty documents."""
    folder = tmp_path_factory.mktemp("workers")
    documents = {f"d{i}": f"w{i} w{i + 1} w{2 * i}" for i in range(20)}
    probes = Probes({"0": "w0"}, documents, {"0": {"d0": 1}})
    export_encoder(tiny_encoder(), folder / "encoder", ExportSpec(), probes)
    encoder = OnnxEncoder.load(folder / "encoder")
    build_index(encode_texts(encoder, documents, "document", folder / "corpus"), IndexSpec(), folder / "store")
    more = {**documents, "d20": "w20 w21"}
    encode_texts(encoder, more, "document", folder / "more")
    return folder


@pytest.fixture
def start(world: Path, tmp_path: Path) -> Iterator[StartWorkers]:
    """Start ``rkd serve`` and return its process and port once all workers serve."""
    started = []

    def start(*options: object) -> tuple[subprocess.Popen[str], int]:
        verb = [sys.executable, "-m", "retrieval_kd.cli.main", "serve", world / "store", "--encoder", world / "encoder"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [*map(str, [*verb, *options])]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        line = process.stdout.readline()
        assert line, process.stderr.read()
        return process, int(line.split(";")[0].rpartition(":")[2])

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def children(process: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.05)


def can_bind(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def answers(port: int) -> bool:
    """Ask over a connection of its own."""
    with RetrievalClient(f"127.0.0.1:{port}") as client:
        try:
            return len(client.search("w1 w2", top_k=3).hits) == 3
        except ServeError:
            return False


def metric(port: int, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
        lines = page.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_workers_share_calls_and_metrics_and_a_dead_one_is_replaced(start: StartWorkers, world: Path) -> None:
    """Without it one crash would halve a server for good, and metrics would show one worker of several."""
    metrics = free_port()
    process, port = start("--workers", 2, "--metrics-port", metrics)
    first = children(process)
    assert len(first) == 2
    assert all(answers(port) for _ in range(12))
    searches = 'rkd_requests_total{code="OK",method="/dense.retrieval.v1.RetrievalService/Search"'
    assert metric(metrics, searches) == 12
    assert metric(metrics, "rkd_index_documents ") == 20
    build_index(EncodedCorpus.load(world / "more"), IndexSpec(), world / "store")
    process.send_signal(signal.SIGHUP)
    until(lambda: metric(metrics, "rkd_index_documents ") == 21)
    os.kill(first[0], signal.SIGKILL)
    until(lambda: len(children(process)) == 2 and first[0] not in children(process))
    until(lambda: all(answers(port) for _ in range(12)))
    assert metric(metrics, searches) > 12, "what the dead one counted is not lost"
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert can_bind(port)


@pytest.mark.slow
def test_every_process_logs_json_when_told(start: StartWorkers) -> None:
    """Without it a collector of logs stumbles over the very line that says a worker has died."""
    process, port = start("--workers", 2, "--log-format", "json")
    assert answers(port)
    first = children(process)
    os.kill(first[0], signal.SIGKILL)
    until(lambda: len(children(process)) == 2 and first[0] not in children(process))
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    logged = [json.loads(line) for line in process.stderr.read().splitlines()]
    (died,) = (entry for entry in logged if entry["logger"] == "serve.workers")
    assert (died["level"], f"(pid {first[0]}) ended with -9" in died["message"]) == ("error", True)
    assert any(entry["logger"] == "serve.access" for entry in logged)


@pytest.mark.slow
def test_a_killed_parent_leaves_no_orphan_and_the_port_free(start: StartWorkers) -> None:
    """Fault: kill -9 of the supervisor. Without it orphans would go on answering from an old index."""
    process, port = start("--workers", 2)
    workers = children(process)
    # A second server on the port would share its calls in silence.
    with pytest.raises(AssertionError, match="the port is taken"):
        start("--workers", 2, "--port", port)
    with pytest.raises(AssertionError, match="the port is taken"):
        start("--port", port)
    process.kill()
    until(lambda: not any(alive(pid) for pid in workers))
    until(lambda: can_bind(port), 5)


@pytest.mark.slow
def test_a_server_that_cannot_begin_says_why_and_leaves_nothing(start: StartWorkers, tmp_path: Path) -> None:
    """Without it a wrong path would have the supervisor start dying workers for ever."""
    with pytest.raises(AssertionError) as said:
        start("--workers", 2, "--reranker", tmp_path / "nowhere")
    # Once, whatever the number of workers.
    (line,) = (line for line in str(said.value).splitlines() if "nowhere" in line)
    assert "error: " in line
    assert "nowhere: no manifest.json" in line
    assert "ended with" not in str(said.value)


def test_workers_refuse_an_admin_port_that_another_servers_workers_share(tmp_path: Path) -> None:
    """Without it two servers take turns on the port, and a publish goes to whichever the kernel picks."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        config = ServeConfig(tmp_path, tmp_path, port=0, workers=2, admin_port=taken)
        with pytest.raises(ServeError, match=f"cannot listen on 127.0.0.1:{taken}: the port is taken"):
            run_workers(config)


def test_the_configuration_reaches_the_workers_as_it_is() -> None:
    """Without it an option could be lost on its way to a worker, such as the one that encrypts."""
    config = ServeConfig(
        Path("store"),
        Path("encoder"),
        tls=CertificateFiles(Path("cert"), Path("key"), Path("ca")),
        tokens=Path("tokens"),
        limits=Limits(max_top_k=7),
        threads=3,
    )
    assert ServeConfig.from_json(config.to_json()) == config
    assert ServeConfig.from_json(ServeConfig(Path("a"), Path("b")).to_json()) == ServeConfig(Path("a"), Path("b"))


@pytest.mark.parametrize("served", [True, False])
def test_workers_that_have_served_are_started_again_even_if_all_died(served: bool, tmp_path: Path) -> None:
    """Two workers killed, and one again while it loads, would otherwise end a server that could go on."""
    supervisor = _Supervisor(ServeConfig(tmp_path, tmp_path), dict(os.environ), served=served)
    died = subprocess.Popen(["false"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    died.wait()
    worker = _Worker(0, died, time.monotonic())
    supervisor.workers.append(worker)
    if served:
        supervisor.tick()
        assert worker.start_at is not None
    else:
        with pytest.raises(ServeError, match="worker 0 ended with 1 before it served"):
            supervisor.tick()
