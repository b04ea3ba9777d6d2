"""The command line as a person meets it: fast help, one-line errors, exit codes, nothing half-written."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_collection_folder, tiny_encoder, tiny_encoder_folder

from index.served import served_folder
from retrieval_kd.cli import main as command
from retrieval_kd.cli.common import emit
from retrieval_kd.encoders.corpus import EncodedCorpus, encode_corpus
from retrieval_kd.recipes.schema import CollectionSpec, ExportSpec, IndexSpec


class Rkd:
    """Runs ``rkd`` in this process and keeps what it said."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        """Return exit code, standard output and standard error."""
        self._monkeypatch.setattr(sys, "argv", ["rkd", *map(str, arguments)])
        try:
            command.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = self._capsys.readouterr()
        return code, out, err

    def fails(self, *arguments: object) -> str:
        """Run a command that must fail with one line and return that line."""
        code, _, err = self(*arguments)
        lines = [line for line in err.splitlines() if not line.startswith("»")]
        assert code == 1, err
        assert len(lines) == 1, err
        assert lines[0].startswith("error: ")
        return lines[0]


@pytest.fixture
def rkd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Rkd:
    """The command."""
    return Rkd(monkeypatch, capsys)


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny collection in BEIR layout."""
    return tiny_collection_folder(tmp_path_factory.mktemp("collection") / "tiny-collection")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, collection: Path) -> Path:
    """Two exported encoders of different spaces, ``a`` and ``b``, and an index of ``a``."""
    from index.build import build_index
    from retrieval_kd.collections import open_collection
    from retrieval_kd.encoders.onnx import OnnxEncoder
    from retrieval_kd.export.onnx_export import Probes, export_encoder

    root = tmp_path_factory.mktemp("exported")
    opened = open_collection(CollectionSpec(str(collection)))
    texts = {"t1": "w1 w2 w3", "t2": "w4 w5"}
    for name, seed in (("a", 0), ("b", 1)):
        probes = Probes(texts, texts, {"t1": {"t1": 1}, "t2": {"t2": 1}})
        export_encoder(tiny_encoder(seed), root / name, ExportSpec(), probes)
    encode_corpus(OnnxEncoder.load(root / "a"), opened, root / "vectors")
    build_index(EncodedCorpus.load(root / "vectors"), IndexSpec(), root / "store")
    return root


def test_help_is_instant_and_names_every_verb() -> None:
    """Without it a torch import at module top would make --help take ten seconds."""
    verb = [sys.executable, "-m", "retrieval_kd.cli.main", "--help"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(verb, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    for name in ("demo", "run", "mine", "teach", "score", "train", "export", "index", "serve", "search", "eval"):
        assert f" {name} " in done.stdout
    # Processor time, for a busy machine stretches the wall's; a torch import would take several times this bound.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_wrong_usage_is_2_and_wrong_input_is_1(rkd: Rkd) -> None:
    """Without it a script could not tell a typo in its own call from a fault in its data."""
    assert rkd("mine")[0] == 2
    assert rkd("no-such-verb")[0] == 2
    assert "did you mean 'margin_mse'" in rkd.fails("mine", "margin_mes")


def test_recipes_are_listed_and_shown(rkd: Rkd) -> None:
    """Without it nobody would know what there is to run."""
    code, out, _ = rkd("recipes", "--json")
    assert code == 0
    assert {"margin_mse", "leaf", "demo"} <= {recipe["name"] for recipe in json.loads(out)}
    code, out, _ = rkd("recipes", "show", "leaf", "--set", "student.layers=[0]")
    assert code == 0
    assert "layers:\n  - 0\n" in out
    assert "Needs the large encoder" in out
    assert "embedding_regression" in out
    assert "unknown key" in rkd.fails("recipes", "show", "leaf", "--set", "studen.layers=[0]")
    for losses, message in (
        ("[foo]", "no loss 'foo'"),
        ("[{name: leaf}]", "no loss"),
        ("[{name: margin_mse, options: {x: 1}}]", "no option 'x'"),
    ):
        code, out, err = rkd("recipes", "show", "margin_mse", "--set", f"losses={losses}")
        assert (code, out) == (1, "")
        assert message in err
    code, out, _ = rkd("recipes")
    assert code == 0
    groups = {block.splitlines()[0]: block for block in out.split("\n\n")}
    assert groups["Start here"].splitlines()[1].split()[0] == "distil"
    assert "margin_mse" in groups["Needs a teacher's scores of each candidate"]


def test_missing_and_malformed_collections(rkd: Rkd, tmp_path: Path, collection: Path) -> None:
    """Without it a wrong path would end in a trace after the models are loaded."""
    root = tmp_path / "artifacts"
    common = ("--artifacts", root, "--set")
    assert "no such folder" in rkd.fails("mine", "leaf", *common, f"collection={tmp_path / 'none'}")
    broken = tiny_collection_folder(tmp_path / "broken")
    lines = (broken / "corpus.jsonl").read_text().splitlines()
    (broken / "corpus.jsonl").write_text("\n".join([*lines[:3], '{"_id": "x", "text"', *lines[3:]]))
    assert "corpus.jsonl:4" in rkd.fails("eval", "beir", broken, "--bm25")
    assert "split 'tset'" in rkd.fails("eval", "beir", collection, "--bm25", "--split", "tset")
    assert "did you mean" in rkd.fails("eval", "beir", collection, "--bm25", "--measure", "nDGC@10")
    assert "no system to measure" in rkd.fails("eval", "beir", collection)
    assert not root.exists() or not list(root.glob("*/manifest.json"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("losses.0.name=embeding_regression", "no loss 'embeding_regression', did you mean 'embedding_regression'"),
        ("losses.0.options={metrik: l2}", "embedding_regression has no option 'metrik'"),
        ("losses.0.name=pair_distill", "pair_distill reads pairwise preferences"),
        ("evaluation.measures=[nDGC@10]", "unknown measure 'nDGC@10', did you mean 'nDCG@10'"),
    ],
)
def test_what_is_used_last_is_checked_first(
    rkd: Rkd, tmp_path: Path, collection: Path, override: str, message: str
) -> None:
    """Without it a misspelt loss or measure would be found after hours of scoring, or end in a trace."""
    root = tmp_path / "artifacts"
    error = rkd.fails("run", "leaf", "--artifacts", root, "--set", f"collection={collection}", "--set", override)
    assert message in error
    assert not root.exists()


def test_a_runs_folder_may_be_served_with_another_encoder(tmp_path: Path) -> None:
    """Without it --encoder would make a run's folder look like a store without an index."""
    (tmp_path / "run" / "index").mkdir(parents=True)
    (tmp_path / "run" / "encoder").mkdir()
    run, other = tmp_path / "run", tmp_path / "other"
    assert served_folder(run, None) == (run / "index", run / "encoder")
    assert served_folder(run, other) == (run / "index", other)
    assert served_folder(run / "index", other) == (run / "index", other)


def test_model_without_tokenizer(rkd: Rkd, tmp_path: Path, collection: Path) -> None:
    """Without it another tokenizer could be guessed from the model's name, and every vector would be wrong."""
    model = tiny_encoder_folder(tmp_path / "model")
    (model / "tokenizer.json").unlink()
    error = rkd.fails(
        "mine", "leaf", "--artifacts", tmp_path / "a", "--set", f"collection={collection}", "--set",
        f"encoder={{model: {model}, max_length: 24}}",
    )  # fmt: skip
    assert "no tokenizer.json" in error


def test_eval_measures_index_bm25_and_run_file_together(
    rkd: Rkd, tmp_path: Path, collection: Path, exported: Path
) -> None:
    """Without it a run file written by one evaluation could score differently in the next."""
    out = tmp_path / "report"
    code, text, _ = rkd(
        "eval", "beir", collection, "--bm25", "--index", exported / "store", "--encoder", exported / "a",
        "--out", out, "--json",
    )  # fmt: skip
    assert code == 0
    first = json.loads(text)
    assert [system["role"] for system in first["systems"]] == ["bm25", "bi-encoder"]
    assert (out / "report.html").is_file()
    run = next((out / "runs").glob("bm25*.trec"))
    code, text, _ = rkd("eval", "beir", collection, "--run", run, "--json")
    assert code == 0
    again = json.loads(text)["systems"][0]
    assert {k: again[k] for k in first["measures"]} == {k: first["systems"][0][k] for k in first["measures"]}
    code, text, _ = rkd("eval", "report", out, "--markdown")
    assert code == 0
    assert "| BM25 (" in text


def test_index_build_verify_inspect(rkd: Rkd, tmp_path: Path, collection: Path, exported: Path) -> None:
    """Without it the documented way to index another corpus would be untested."""
    store = tmp_path / "store"
    build = ("index", "build", store, "--collection", collection, "--encoder", exported / "a")
    code, text, _ = rkd(*build, "--kind", "hnsw", "--storage", "float16", "--fields", "title, text", "--json")
    assert code == 0
    version = json.loads(text)["version"]
    seen = json.loads(rkd("index", "inspect", store, "--json")[1])
    assert (seen["count"], seen["fields"], seen["index"]["storage"]) == (
        72,
        {"title": "text", "text": "text"},
        "float16",
    )
    assert json.loads(rkd("index", "verify", store, "--json")[1])["whole_versions"] == [version]
    elsewhere = ("--vectors", tmp_path / "vectors")
    assert "cannot search documents" in rkd.fails(*build, "--query-encoder", exported / "b", *elsewhere)
    assert not (tmp_path / "vectors").exists()
    assert "index.kind: 'lsh'" in rkd.fails(*build, "--kind", "lsh")
    newer = json.loads(rkd(*build, "--kind", "exact", "--json")[1])["version"]
    assert json.loads(rkd("index", "rollback", store, "--json")[1])["version"] == version
    assert json.loads(rkd("index", "publish", store, newer, "--json")[1])["version"] == newer
    assert "no version 'x'" in rkd.fails("index", "publish", store, "x")
    assert json.loads(rkd("index", "gc", store, "--keep", "1", "--json")[1])["removed"] == [version]
    asked = tmp_path / "queries.txt"
    asked.write_text("w1 w2\nw3\n\nw4 w5 w6\n")
    tune = ("index", "tune", store, "--query-encoder", exported / "a", "--json")
    assert json.loads(rkd(*tune, "--queries", asked)[1])["recall"] == 1.0
    assert "give one query a line" in rkd.fails(*tune, "--queries", "dev")
    newer = json.loads(rkd(*tune, "--queries", "dev", "--collection", collection)[1])["version"]
    assert json.loads(rkd("index", "inspect", store, "--json")[1])["tuning"]["queries"] == 12
    assert "is not in (0, 1]" in rkd.fails(*build, "--kind", "auto", "--queries", "dev", "--target-recall", "1.5")
    vectors = next((store / "versions" / newer).glob("vectors.npy"))
    vectors.chmod(0o644)
    data = bytearray(vectors.read_bytes())
    data[-1] ^= 1
    vectors.write_bytes(bytes(data))
    assert "vectors.npy" in rkd.fails("index", "verify", store)


def test_tuning_what_is_not_there_leaves_nothing(rkd: Rkd, tmp_path: Path, collection: Path, exported: Path) -> None:
    """Without it a mistyped store would come into being, and an empty file be taken for an empty collection."""
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    tune = ("index", "tune", "--query-encoder", exported / "a", "--queries")
    assert "no index is published here" in rkd.fails(*tune, "dev", "--collection", collection, tmp_path / "typo")
    assert f"--queries: {empty} has no queries" in rkd.fails(*tune, empty, exported / "store")
    build = ("index", "build", tmp_path / "new", "--collection", collection, "--encoder", exported / "a")
    assert f"--queries: {empty} has no queries" in rkd.fails(*build, "--queries", empty)
    assert list(tmp_path.iterdir()) == [empty]
    assert not (exported / "store" / "queries").exists()


def test_serve_refuses_strangers_and_taken_ports(rkd: Rkd, exported: Path, tmp_path: Path) -> None:
    """Without it a server would answer from the wrong space, or wait on a port nobody can reach."""
    store = exported / "store"
    assert "cannot search documents" in rkd.fails("serve", store, "--encoder", exported / "b", "--port", "0")
    assert "name it with --encoder" in rkd.fails("serve", store)
    assert "no index is published" in rkd.fails("serve", tmp_path, "--encoder", exported / "a", "--port", "0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert "cannot listen" in rkd.fails("serve", store, "--encoder", exported / "a", "--port", port)
        assert rkd("serve", store, "--encoder", exported / "a", "--port", "99999")[0] == 2


@pytest.mark.parametrize(("runs", "workers"), [("serve.server.run_server", 1), ("serve.workers.run_workers", 2)])
def test_a_hangup_does_not_end_a_server_that_is_starting(
    rkd: Rkd, exported: Path, monkeypatch: pytest.MonkeyPatch, runs: str, workers: int
) -> None:
    """Without it the signal that publishes an index kills the server which has just been started again."""
    found = []
    monkeypatch.setattr(runs, lambda *_: found.append(signal.getsignal(signal.SIGHUP)))
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        assert rkd("serve", exported / "store", "--encoder", exported / "a", "--workers", workers)[0] == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert found == [signal.SIG_IGN]


def test_a_taken_port_is_one_line_from_the_process_too(exported: Path) -> None:
    """Without it grpc's core would write lines of its own, with source files and addresses, before ours."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        verb = [sys.executable, "-m", "retrieval_kd.cli.main", "serve", str(exported / "store")]
        arguments = ["--encoder", str(exported / "a"), "--port", port]
        done = subprocess.run([*verb, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["error"]


def test_a_started_server_has_imported_nothing_heavy(exported: Path) -> None:
    """Without it an import inside a function could bring torch into the serving image, past every test of modules."""
    verb = [sys.executable, "-X", "importtime", "-m", "retrieval_kd.cli.main"]
    arguments = ["serve", str(exported / "store"), "--encoder", str(exported / "a"), "--port", "0", "--json"]
    with subprocess.Popen([*verb, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        ready = server.stdout.readline()
        server.terminate()
        _, log = server.communicate()
    assert "port" in ready, log
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in log.splitlines()}
    assert {"faiss", "onnxruntime", "grpc"} <= imported
    assert not imported & {"torch", "transformers", "sentence_transformers", "accelerate", "bm25s"}


def test_search_a_served_index_and_a_dead_port(rkd: Rkd, exported: Path) -> None:
    """Without it the client for people could disagree with the server about either success or failure."""
    from retrieval_kd.cli.pipeline import serving

    with serving(exported / "store", exported / "a") as target:
        code, text, _ = rkd("search", target, "w1 w2", "-k", "3", "--json")
        assert code == 0
        hits = json.loads(text)["hits"]
        assert [hit["rank"] for hit in hits] == [1, 2, 3]
        assert "top_k" in rkd.fails("search", target, "w1", "-k", "0")
        assert "text" in rkd.fails("search", target, "  ")
        assert "not valid Unicode" in rkd.fails("search", target, os.fsdecode(b"w1 \xff"))
        for wanted, message in (
            ('{"not": ' * 300 + '{"eq": {"a": 1}}' + "}" * 300, "levels deep; flatten it"),
            ('{"not": ' * 100_000 + '{"eq": {"a": 1}}' + "}" * 100_000, "levels deep; flatten it"),
            (f'{{"eq": {{"a": {"1" * 5000}}}}}', "--filter: not JSON"),
            ('{"eq": {"a": "\\ud800"}}', "not valid Unicode"),
        ):
            assert message in rkd.fails("search", target, "w1", "--filter", wanted)
    assert "127.0.0.1:1" in rkd.fails("search", "127.0.0.1:1", "w1")


@pytest.mark.parametrize(
    ("target", "token", "message"), [("", "", "give HOST:PORT"), ("127.0.0.1:1", "é", "not printable ASCII")]
)
def test_a_search_that_cannot_begin_is_one_line_from_the_process_too(target: str, token: str, message: str) -> None:
    """Without it grpc's core would write lines of its own, with source files and addresses, before ours."""
    verb = [sys.executable, "-m", "retrieval_kd.cli.main", "search", target, "w1"]
    environment = {**os.environ, **({"RKD_TOKEN": token} if token else {})}
    environment.pop("GRPC_VERBOSITY", None)
    done = subprocess.run(verb, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_interruption_is_one_line_that_says_how_to_go_on() -> None:
    """Without it Ctrl-C would end hours of work in silence, and nobody would know that they are kept."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        verb = [sys.executable, "-m", "retrieval_kd.cli.main", "search", f"127.0.0.1:{silent.getsockname()[1]}", "w1"]
        with subprocess.Popen(verb, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as waiting:
            silent.settimeout(60)
            connection, _ = silent.accept()
            waiting.send_signal(signal.SIGINT)
            out, err = waiting.communicate(timeout=60)
            connection.close()
    assert (waiting.returncode, out, err) == (130, "", "interrupted; run the same command to go on\n")


@pytest.mark.parametrize("option", ["--cert", "--key"])
def test_a_client_certificate_never_goes_with_plain_text(rkd: Rkd, exported: Path, option: str) -> None:
    """Without it whoever proves himself by a certificate would send query and token in plain text, and be told rc 0."""
    from retrieval_kd.cli.pipeline import serving

    with serving(exported / "store", exported / "a") as target:
        assert "give --ca" in rkd.fails("search", target, "w1", option, exported / "own.pem")
        assert "give both" in rkd.fails(
            "search", target, "w1", "--ca", exported / "ca.pem", option, exported / "own.pem"
        )


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, collection: Path, exported: Path) -> None:
    """Without it a full disk would end in a trace, or in an encoding that counts as whole."""
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000));"
        "from retrieval_kd.cli.main import main; main()"
    )
    store = tmp_path / "store"
    verb = ["index", "build", str(store), "--collection", str(collection), "--encoder", str(exported / "a")]
    done = subprocess.run([sys.executable, "-c", script, *verb], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    # Which disk, where there are several, only the path tells.
    assert done.stderr.strip().startswith(f"error: disk full while writing {store}")
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(store.rglob("manifest.json"))
    assert not (store / "CURRENT").exists()


def test_a_terminal_without_a_letter_still_gets_the_report(tmp_path: Path) -> None:
    """Without it a long run ends in a trace because its table has a dash that latin-1 lacks."""
    recipe = tmp_path / "own.yaml"
    recipe.write_text("name: own\nabout: one – two 語\nsource: s\nlosses: [{name: margin_mse}]\n", encoding="utf-8")
    for arguments, found in ((["show"], b"one \\u2013 two \\u8a9e"), (["show", "--json"], b"one \\u2013 two \\u8a9e")):
        done = subprocess.run(
            [sys.executable, "-m", "retrieval_kd.cli.main", "recipes", *arguments, str(recipe)],
            env=os.environ | {"PYTHONIOENCODING": "latin-1"},
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert found in done.stdout


def test_json_loses_no_letter_to_the_terminals_encoding(capsys: pytest.CaptureFixture[str]) -> None:
    """Without it a script gets the ids and paths of other documents and folders, and no error."""
    result = {"doc_id": "語-1", "path": "/data/ä–"}
    for encoding in ("latin-1", "ascii", "utf-8"):
        with io.TextIOWrapper(io.BytesIO(), encoding=encoding) as out, contextlib.redirect_stdout(out):
            emit(result, as_json=True)
            out.flush()
            assert json.loads(out.buffer.getvalue().decode(encoding)) == result
