"""The server as a process: what it imports, how it ends, and the image it is shipped in."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from retrieval_kd.errors import ServeError
from serve.client import RetrievalClient
from serve.health import check_health
from serve.tls import require_safe_address

ROOT = Path(__file__).resolve().parents[2]
StartProcess = Callable[..., tuple[subprocess.Popen[str], str]]
FAKES = Path(__file__).with_name("serve_fakes.py")


@pytest.fixture
def process(tmp_path: Path) -> Iterator[StartProcess]:
    """Start a server process with fakes; ``process(seconds)`` sets how long each batch takes."""
    started = []

    def start(seconds: float = 0.0) -> tuple[subprocess.Popen[str], str]:
        ready = tmp_path / "ready"
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(FAKES), str(ready), str(seconds)]
        child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        started.append(child)
        give_up = time.monotonic() + 30
        while not ready.exists():
            assert child.poll() is None, child.stderr.read()
            assert time.monotonic() < give_up
            time.sleep(0.02)
        return child, f"127.0.0.1:{ready.read_text()}"

    yield start
    for child in started:
        child.kill()
        child.wait()
        child.stderr.close()


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_lets_the_call_in_flight_finish_and_ends_with_zero(
    process: StartProcess, name: signal.Signals
) -> None:
    """Orchestrators stop servers with SIGTERM all day; each of them may lose no answer and count as no crash."""
    child, target = process(0.5)
    with RetrievalClient(target) as client:
        client.wait_until_ready(10)
        with ThreadPoolExecutor(1) as caller:
            call = caller.submit(client.search, "slow question")
            time.sleep(0.25)
            child.send_signal(name)
            assert len(call.result(10).hits) == 10
    assert child.wait(10) == 0
    assert "Traceback" not in child.stderr.read()
    with pytest.raises(ServeError, match="no health answer"):
        check_health(target, 0.5)


def test_the_health_command_answers_with_its_exit_code(process: StartProcess) -> None:
    """Container health checks read nothing but the exit code; people read the line."""
    child, target = process()

    def health(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "serve.health", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )

    assert health(target).returncode == 0
    assert health().returncode == 2
    child.terminate()
    child.wait(10)
    failed = health(target)
    assert failed.returncode == 1
    assert failed.stderr.strip() == f"{target}: no health answer (UNAVAILABLE); is the server running?"


def test_serving_imports_nothing_of_training() -> None:
    """Torch in the serving image is a gigabyte and ten seconds that no query needs."""
    code = (
        "import sys, serve.server, serve.client, serve.health\n"
        "import index.search, index.store, retrieval_kd.encoders.onnx\n"
        "heavy = {'torch', 'transformers', 'sentence_transformers', 'accelerate', 'matplotlib', 'scipy'}\n"
        "sys.exit(' '.join(sorted(heavy & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


def stages() -> list[str]:
    text = (ROOT / "Dockerfile").read_text()
    return re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]


def test_the_image_serves_without_torch_as_an_ordinary_user() -> None:
    """An image that runs as root, never reports its health or carries torch is refused by those who deploy it."""
    final = stages()[-1]
    instructions = "\n".join(line for line in final.splitlines() if not line.lstrip().startswith("#"))
    assert not re.search(r"torch|transformers|\[train|pip install", instructions)
    user = re.findall(r"^USER (\S+)", instructions, flags=re.MULTILINE)
    assert user
    assert user[-1].split(":")[0] not in ("root", "0")
    assert "HEALTHCHECK" in instructions
    assert "serve.health" in instructions
    assert re.search(r"^ENTRYPOINT \[", instructions, flags=re.MULTILINE), "shell form would swallow SIGTERM"


def test_the_images_command_may_listen_where_it_says() -> None:
    """Without it the container would refuse its own address and stop at once."""
    (entry,) = re.findall(r"^ENTRYPOINT (\[.*\])", stages()[-1], flags=re.MULTILINE)
    words = json.loads(entry)
    require_safe_address(words[words.index("--host") + 1], None, insecure="--insecure" in words)


def test_every_file_the_image_copies_exists() -> None:
    """A COPY of a file that was renamed fails the build, on the day of the release."""
    sent = (ROOT / ".dockerignore").read_text().split()
    for stage in stages():
        for line in re.findall(r"^COPY (?!--from)(.+)$", stage, flags=re.MULTILINE):
            *sources, _ = [word for word in line.split() if not word.startswith("--")]
            for source in sources:
                assert (ROOT / source).exists(), source
                assert f"!{source.removeprefix('./')}" in sent
