"""Tokens, roles, certificates: who is let in, who is not, and what a rotation does to those who are."""

import datetime
import queue
from pathlib import Path
from unittest.mock import Mock

import grpc
import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from google.rpc import error_details_pb2
from serve_fakes import FakeSource, Running, Start
from test_hot_swap import FIRST, SECOND, versions
from test_server import details

from protos.dense.retrieval.v1 import retrieval_pb2 as pb
from protos.dense.retrieval.v1 import retrieval_pb2_grpc as rpc
from retrieval_kd.errors import ServeError
from serve import auth
from serve.auth import TokenFile
from serve.client import RetrievalClient, Tls
from serve.tls import CertificateFiles, is_loopback, server_credentials

READ, ADMIN, OTHER = "read-0123456789abcdef", "admin-0123456789abcdef", "other-0123456789abcdef"
SEARCH, PUBLISH = "/dense.retrieval.v1.RetrievalService/Search", "/dense.retrieval.v1.IndexAdminService/PublishIndex"


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(f"# who may do what\n\nread  {READ}  shop\nadmin {ADMIN}\n")
    return path


@pytest.fixture
def running(start: Start, tokens: Path) -> Running:
    return start(searcher=FakeSource(*versions()), tokens=tokens)


def search_code(target: str, metadata: list[tuple[str, str]]) -> grpc.StatusCode:
    with grpc.insecure_channel(target) as channel:
        request = pb.SearchRequest(text="a", top_k=1)
        _, call = rpc.RetrievalServiceStub(channel).Search.with_call(request, metadata=metadata)
        return call.code()


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        [("authorization", "")],
        [("authorization", "Bearer")],
        [("authorization", "Bearer ")],
        [("authorization", READ)],
        [("authorization", f"Basic {READ}")],
        [("authorization", f"Bearer {READ}x")],
        [("authorization", f"Bearer {READ[:-1]}")],
        [("authorization", f"Bearer {OTHER}")],
        [("x-token", f"Bearer {READ}")],
    ],
)
def test_no_token_and_wrong_tokens_are_refused_everywhere(running: Running, metadata: list[tuple[str, str]]) -> None:
    """Fault: no token, wrong token. Without it an index of private documents is open to whoever finds the port."""
    with grpc.insecure_channel(running.target) as channel:
        calls = [
            (rpc.RetrievalServiceStub(channel).Search, pb.SearchRequest(text="a", top_k=1)),
            (rpc.EmbeddingServiceStub(channel).Embed, pb.EmbedRequest(texts=["a"])),
            (rpc.IndexServiceStub(channel).GetIndex, pb.GetIndexRequest()),
            (rpc.ServerInfoServiceStub(channel).GetServerInfo, pb.GetServerInfoRequest()),
            (rpc.IndexAdminServiceStub(channel).PublishIndex, pb.PublishIndexRequest()),
        ]
        for call, request in calls:
            with pytest.raises(grpc.RpcError) as refused:
                call(request, metadata=metadata)
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert details(refused.value, error_details_pb2.ErrorInfo).reason == "UNAUTHENTICATED"
        stream = rpc.RetrievalServiceStub(channel).StreamSearch(iter([pb.StreamSearchRequest()]), metadata=metadata)
        with pytest.raises(grpc.RpcError) as refused:
            next(stream)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_readers_may_search_and_not_publish_and_administrators_may_both(running: Running) -> None:
    """Without it every web front end could replace the index."""
    with RetrievalClient(running.target, token=READ) as reader:
        assert reader.search("a").index_version == FIRST
        assert len(list(reader.search_stream(["a", "b"]))) == 2
        with pytest.raises(ServeError, match="PublishIndex needs the role admin"):
            reader.publish(SECOND)
    with RetrievalClient(running.target, token=ADMIN) as admin:
        assert admin.search("a").index_version == FIRST
        assert admin.publish(SECOND) == FIRST


def test_a_withdrawn_token_ends_open_streams(running: Running, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream lasts as long as its requests come: whoever was let in once would otherwise never be put out."""
    monkeypatch.setattr(auth, "_CHECK_SECONDS", 0.0)
    texts: queue.SimpleQueue[str] = queue.SimpleQueue()
    with RetrievalClient(running.target, token=READ) as client:
        answers = client.search_stream(iter(texts.get, ""))
        texts.put("a")
        assert len(next(answers).hits) == 10
        tokens.write_text(f"read {OTHER}\n")
        texts.put("a")
        with pytest.raises(ServeError, match="no token that this server knows"):
            next(answers)
        texts.put("")


def test_health_needs_no_token(running: Running) -> None:
    """Without it every orchestrator would have to be told a secret."""
    with RetrievalClient(running.target) as client:
        client.wait_until_ready(5)


def test_without_tokens_there_is_no_administration_but_on_its_own_port(start: Start) -> None:
    """Without it a server on a laptop would let every local user replace its index."""
    with RetrievalClient(start().target) as client, pytest.raises(ServeError, match="UNIMPLEMENTED"):
        client.publish()
    port = 0
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = start(searcher=FakeSource(*versions()), admin_port=port)
    with RetrievalClient(f"127.0.0.1:{port}") as admin, RetrievalClient(running.target) as client:
        assert admin.publish(SECOND) == FIRST
        assert client.search("a").index_version == SECOND
        with pytest.raises(ServeError, match="UNIMPLEMENTED"):
            admin.search("a")


def bearer(token: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {token}")]


def test_tokens_change_while_the_server_runs_and_a_broken_file_changes_nothing(
    tokens: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without it revoking a leaked token would need a restart, and a typo would lock everybody out or let all in."""
    monkeypatch.setattr(auth, "_CHECK_SECONDS", 0.0)
    known = TokenFile(tokens)
    known.authorise(SEARCH, bearer(READ))
    tokens.write_text(f"read {OTHER}\n")
    known.authorise(SEARCH, bearer(OTHER))
    with pytest.raises(ServeError, match="no token that this server knows"):
        known.authorise(SEARCH, bearer(READ))
    for broken in ("", "read\n", f"root {READ}\n", "read short\n"):
        tokens.write_text(broken)
        known.authorise(SEARCH, bearer(OTHER))
        known.authorise(SEARCH, bearer(OTHER))
        assert caplog.text.count("the tokens known before stay") == 1
        caplog.clear()
    tokens.unlink()
    known.authorise(SEARCH, bearer(OTHER))
    tokens.write_text(f"admin {READ}\n")
    known.authorise(PUBLISH, bearer(READ))


def test_a_changed_token_file_that_could_not_be_read_for_a_moment_is_read_again(
    tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it a withdrawn token stays good until the next change, because descriptors ran out for a second."""
    monkeypatch.setattr(auth, "_CHECK_SECONDS", 0.0)
    known = TokenFile(tokens)
    tokens.write_text(f"read {OTHER}\n")
    with monkeypatch.context() as moment:
        moment.setattr(auth, "_read", Mock(side_effect=ServeError("too many open files")))
        known.authorise(SEARCH, bearer(READ))
    with pytest.raises(ServeError, match="no token that this server knows"):
        known.authorise(SEARCH, bearer(READ))


def test_a_token_file_may_begin_with_a_byte_order_mark(tokens: Path) -> None:
    """Editors write one that nobody sees; the first line would be refused for no visible reason."""
    tokens.write_text(f"read {READ}\n", encoding="utf-8-sig")
    TokenFile(tokens).authorise(SEARCH, bearer(READ))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no token"),
        ("# only words\n", "has no token"),
        (f"read {READ}\nwrite {OTHER}\n", r"tokens:2: not 'read TOKEN' or 'admin TOKEN'"),
        ("read tooshort\n", r"tokens:1: the token has fewer than 16 characters"),
        ("read übersechzehnzeichen\n", r"tokens:1: the token is not ASCII, so no header can carry it"),
    ],
)
def test_a_bad_token_file_is_refused_at_the_start(tokens: Path, text: str, message: str) -> None:
    """Without it a server would start that lets nobody in, or one that a child could guess."""
    tokens.write_text(text)
    with pytest.raises(ServeError, match=message):
        TokenFile(tokens)


def test_every_token_is_compared_whatever_was_found(tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the time of an answer would tell a guesser how far down the list a token matched."""
    known = TokenFile(tokens)
    compared = []
    real = auth.hmac.compare_digest
    monkeypatch.setattr(auth.hmac, "compare_digest", lambda a, b: compared.append((len(a), len(b))) or real(a, b))
    known.authorise(SEARCH, bearer(READ))
    with pytest.raises(ServeError):
        known.authorise(SEARCH, bearer("x"))
    assert compared == [(32, 32)] * 4


def test_a_token_never_travels_in_plain_text_to_another_machine() -> None:
    """Without it the first call would give the token to whoever listens on the way."""
    with pytest.raises(ServeError, match="could be read on its way; give tls"):
        RetrievalClient("search.example.org:443", token=READ)


@pytest.mark.parametrize("token", ["é" * 16, f"{READ}\n", "\udcff" * 16])
def test_a_token_that_no_header_carries_is_refused_and_not_shown(token: str) -> None:
    """Without it a token read with its line break is an internal error of gRPC, at the first call."""
    with pytest.raises(ServeError, match="the token is not printable ASCII") as refused:
        RetrievalClient("127.0.0.1:1", token=token)
    assert token.strip() not in str(refused.value)


class Certificates:
    """An authority and what it has issued, as files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = trustme.CA()
        self.authority.cert_pem.write_to_path(folder / "ca.pem")
        self.files = CertificateFiles(folder / "cert.pem", folder / "key.pem")
        self.issue()

    def issue(self, expires: datetime.datetime | None = None, authority: trustme.CA | None = None) -> None:
        """Write a new certificate and key over the old, as a rotation does."""
        issued = (authority or self.authority).issue_cert("localhost", "127.0.0.1", not_after=expires)
        for path, blob in (
            (self.files.certificate, issued.cert_chain_pems[0]),
            (self.files.key, issued.private_key_pem),
        ):
            partial = path.with_suffix(".tmp")
            blob.write_to_path(partial)
            partial.replace(path)

    def client(
        self, name: str = "client", authority: trustme.CA | None = None, expires: datetime.datetime | None = None
    ) -> Tls:
        """Return what a client with a certificate uses."""
        issued = (authority or self.authority).issue_cert(f"{name}@example.org", not_after=expires)
        issued.cert_chain_pems[0].write_to_path(self.folder / f"{name}.pem")
        issued.private_key_pem.write_to_path(self.folder / f"{name}.key")
        return Tls(self.folder / "ca.pem", self.folder / f"{name}.pem", self.folder / f"{name}.key")

    @property
    def tls(self) -> Tls:
        """Return what a client without a certificate uses."""
        return Tls(self.folder / "ca.pem")


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path)


def fails(client: RetrievalClient) -> None:
    with client, pytest.raises(ServeError, match="nothing answers there"):
        client.search("a")


def test_plain_text_and_strange_authorities_do_not_reach_an_encrypted_server(
    start: Start, certificates: Certificates, tmp_path: Path
) -> None:
    """Fault: plaintext to TLS. Without it a client could be talked out of encryption, or into a stranger's server."""
    running = start(tls=certificates.files)
    with RetrievalClient(running.target, tls=certificates.tls) as client:
        client.wait_until_ready(10)
        assert len(client.search("a").hits) == 10
    fails(RetrievalClient(running.target, timeout=1))
    strange = tmp_path / "strange.pem"
    trustme.CA().cert_pem.write_to_path(strange)
    fails(RetrievalClient(running.target, timeout=1, tls=Tls(strange)))


def test_clients_without_a_certificate_of_ours_are_refused(start: Start, certificates: Certificates) -> None:
    """Without it mTLS would be TLS: every machine of the network could search."""
    files = CertificateFiles(certificates.files.certificate, certificates.files.key, certificates.folder / "ca.pem")
    running = start(tls=files)
    with RetrievalClient(running.target, tls=certificates.client()) as client:
        assert len(client.search("a").hits) == 10
    fails(RetrievalClient(running.target, timeout=1, tls=certificates.tls))
    fails(RetrievalClient(running.target, timeout=1, tls=certificates.client("stranger", trustme.CA())))
    yesterday = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    fails(RetrievalClient(running.target, timeout=1, tls=certificates.client("former", expires=yesterday)))


def test_client_files_that_are_no_pem_are_named_before_connecting(certificates: Certificates, tmp_path: Path) -> None:
    """Without it a wrong file is reported as a server that does not answer, and somebody restarts the server."""
    good, other = certificates.client(), certificates.client("other")
    for content in ("", "no PEM"):
        (tmp_path / "wrong.pem").write_text(content)
        wrong = tmp_path / "wrong.pem"
        for tls, named in (
            (Tls(wrong), "wrong.pem: not the certificate of an authority"),
            (Tls(good.ca, wrong, good.key), "wrong.pem, .*client.key: not a certificate and its key"),
            (Tls(good.ca, good.certificate, wrong), "client.pem, .*wrong.pem: not a certificate and its key"),
        ):
            with pytest.raises(ServeError, match=named) as refused:
                RetrievalClient("127.0.0.1:1", tls=tls)
            assert "\n" not in str(refused.value)
    with pytest.raises(ServeError, match=r"client\.pem, .*other\.key: not a certificate and its key"):
        RetrievalClient("127.0.0.1:1", tls=Tls(good.ca, good.certificate, other.key))
    with pytest.raises(ServeError, match="belong together; give both"):
        RetrievalClient("127.0.0.1:1", tls=Tls(good.ca, good.certificate))


def test_a_rotated_certificate_is_taken_without_a_restart_and_an_expired_one_is_refused(
    start: Start, certificates: Certificates
) -> None:
    """Fault: expired certificate. Without it every rotation would be an outage of all replicas at once."""
    certificates.issue(expires=datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1))
    running = start(tls=certificates.files)
    fails(RetrievalClient(running.target, timeout=1, tls=certificates.tls))
    certificates.issue()
    with RetrievalClient(running.target, tls=certificates.tls) as old:
        assert len(old.search("a").hits) == 10
        second = trustme.CA()
        certificates.issue(authority=second)
        second.cert_pem.write_to_path(certificates.folder / "second.pem")
        with RetrievalClient(running.target, tls=Tls(certificates.folder / "second.pem")) as new:
            assert len(new.search("a").hits) == 10
        assert len(old.search("a").hits) == 10, "connections made before the rotation go on"


def test_a_half_rotated_pair_leaves_the_old_one_in_use(
    start: Start, certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    """Without it the moment between writing certificate and key would refuse every new connection."""
    running = start(tls=certificates.files)
    whole = certificates.files.key.read_bytes()
    trustme.CA().issue_cert("localhost").private_key_pem.write_to_path(certificates.files.key)
    with RetrievalClient(running.target, tls=certificates.tls) as client:
        assert len(client.search("a").hits) == 10
    assert "the certificate known before stays" in caplog.text
    certificates.files.key.write_bytes(whole)
    with RetrievalClient(running.target, tls=certificates.tls) as client:
        assert len(client.search("a").hits) == 10


def test_a_key_that_is_not_the_certificates_is_refused_at_the_start(certificates: Certificates) -> None:
    """Without it gRPC would start and fail every handshake without a word."""
    trustme.CA().issue_cert("localhost").private_key_pem.write_to_path(certificates.files.key)
    with pytest.raises(ServeError, match="not a certificate and its key"):
        server_credentials(certificates.files)
    with pytest.raises(ServeError, match=r"nowhere.pem: cannot be read"):
        server_credentials(CertificateFiles(Path("nowhere.pem"), certificates.files.key))


def test_an_encrypted_key_is_refused_and_its_password_not_asked_for(certificates: Certificates) -> None:
    """A server would otherwise wait at a prompt that nobody sees, and then blame the port."""
    key = serialization.load_pem_private_key(certificates.files.key.read_bytes(), None)
    locked = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"secret")
    )
    certificates.files.key.write_bytes(locked)
    with pytest.raises(ServeError, match="not a certificate and its key without a password"):
        server_credentials(certificates.files)


def test_what_is_no_authority_is_named(certificates: Certificates, tmp_path: Path) -> None:
    """Blaming the certificate and its key sends people to mend two files that are sound."""
    (tmp_path / "junk.pem").write_text("hello")
    files = CertificateFiles(certificates.files.certificate, certificates.files.key, tmp_path / "junk.pem")
    with pytest.raises(ServeError, match=r"junk.pem: not certificates of authorities"):
        server_credentials(files)


def test_only_addresses_of_this_machine_are_served_in_plain_text(start: Start, certificates: Certificates) -> None:
    """Without it one forgotten option would put a private index on the open network."""
    with pytest.raises(ServeError, match=r"0.0.0.0 can be reached by other machines .* --insecure"):
        start(host="0.0.0.0")
    for options in ({"insecure": True}, {"tls": certificates.files}):
        assert start(host="0.0.0.0", **options).port > 0
    for options in ({"workers": 1}, {"tls": certificates.files}):
        with pytest.raises(ServeError, match=r"--metrics-host 0.0.0.0 can be reached by other machines .* --insecure"):
            start(metrics_host="0.0.0.0", metrics_port=0, **options)
    assert start(metrics_host="0.0.0.0").port > 0, "where no metrics are served nobody can reach them"
    assert start(metrics_host="0.0.0.0", metrics_port=0, insecure=True).port > 0
    assert [is_loopback(host) for host in ("127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost")] == [True] * 5
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", "")] == [False] * 5
