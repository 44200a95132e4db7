"""TLS between real processes: the same tokens, and each failure told apart."""

import itertools
import json
import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from client.node_process import NodeProcess
from coordinator.remote_dispatch import RemoteDispatch, open_remote_dispatch
from shoal import errors
from shoal.artifact import Artifact
from shoal.tls_files import ClientFiles
from shoal.transport import Transport
from support.certificates import LONG_AGO, YESTERDAY, Authority, Pair
from support.cluster import Cluster, Flags
from support.command import assert_refused, shoal
from support.expert_node import reload
from support.fables import NUM_EXPERTS, PROMPT, fables

pytestmark = pytest.mark.processes
KINDS = (Transport.FAST, Transport.GRPCIO)
TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Authorities:
    """ours signed what `node` and `coordinator` show; theirs is a stranger's."""

    ours: Authority
    theirs: Authority
    node: Pair
    coordinator: Pair


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Authorities:
    folder = tmp_path_factory.mktemp("certificates")
    ours = Authority(folder, "ours")
    return Authorities(
        ours, Authority(folder, "theirs"), ours.issue("node"), ours.issue("coordinator", "me")
    )


def mutual(known: Authorities) -> tuple[str, ...]:
    return (*known.node.flags, "--tls-client-ca", str(known.ours.cert))


def meet(
    artifact: Artifact, node: NodeProcess | str, files: ClientFiles | None, **more: Any
) -> RemoteDispatch:
    endpoint = node if isinstance(node, str) else node.endpoint
    return open_remote_dispatch(artifact, f"0-15={endpoint}", shard_wait_s=0, tls=files, **more)


def test_tokens_over_two_nodes_with_mutual_tls_are_those_of_one_process(known: Authorities) -> None:
    """One node is fast, one grpcio; one coordinator's map also has a plain node."""
    run = ("run", fables(), PROMPT, "--max-tokens", "24", "--seed", "3", "--temperature", "0.8")
    alone = shoal(*run, "--json")
    half = NUM_EXPERTS // 2
    with Cluster(Transport.FAST) as fast, Cluster(Transport.GRPCIO) as reference:
        a = fast.node(fables(), extra=mutual(known))
        b = reference.node(fables(), extra=mutual(known))
        c = fast.node(fables())
        assert a.endpoint.startswith("grpcs://") and b.endpoint.startswith("grpcs://")
        for second in (b, c):
            shards = f"0-{half - 1}={a.endpoint},{half}-{NUM_EXPERTS - 1}={second.endpoint}"
            to = ("--moe-shards", shards, "--tls-ca", known.ours.cert, *known.coordinator.flags)
            ended = shoal(*run, "--json", *to)
            assert ended.status == 0, ended.err
            assert json.loads(ended.out)["token_ids"] == json.loads(alone.out)["token_ids"]
            said = "TLS: the connections to this map's nodes are carried by grpcio"
            assert ended.err.startswith(said), ended.err  # a busy machine may add advice


@dataclass(frozen=True, slots=True)
class Shown:
    """Nodes that show different things. The key: whether the node is fast or grpcio."""

    mutual: Mapping[Transport, NodeProcess]
    plain: Mapping[Transport, NodeProcess]
    expired: NodeProcess
    elsewhere: NodeProcess


@pytest.fixture(scope="module")
def shown(path: Path, known: Authorities) -> Iterator[Shown]:
    expired = known.ours.issue("expired", since=LONG_AGO, until=YESTERDAY)
    elsewhere = known.ours.issue("elsewhere", "node.example")
    with Cluster(Transport.FAST) as fast, Cluster(Transport.GRPCIO) as reference:
        extras = (mutual(known), (), expired.flags, elsewhere.flags)
        flags = [Flags(extra=extra) for extra in extras]
        a, b, c, d = fast.nodes(path, flags)
        e, f = reference.nodes(path, flags[:2])
        fast_kind, reference_kind = KINDS
        yield Shown({fast_kind: a, reference_kind: e}, {fast_kind: b, reference_kind: f}, c, d)


@pytest.mark.parametrize("kind", KINDS)
def test_both_ends_agree_where_each_trusts_the_other(
    artifact: Artifact, known: Authorities, shown: Shown, kind: Transport
) -> None:
    with closing(meet(artifact, shown.mutual[kind], known.ours.trusted(known.coordinator))):
        pass


def refused(artifact: Artifact, node: NodeProcess | str, files: ClientFiles | None) -> str:
    with pytest.raises(errors.NodeUntrusted) as caught:
        meet(artifact, node, files)
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_coordinator_that_shows_nothing_is_told_to(
    artifact: Artifact, known: Authorities, shown: Shown, kind: Transport
) -> None:
    why = refused(artifact, shown.mutual[kind], known.ours.trusted())
    assert "asks for a client certificate: give --tls-cert and --tls-key" in why


@pytest.mark.parametrize("kind", KINDS)
def test_a_coordinator_that_a_stranger_vouches_for_is_told_so(
    artifact: Artifact, known: Authorities, shown: Shown, kind: Transport
) -> None:
    stranger = known.theirs.issue("coordinator", "me")
    why = refused(artifact, shown.mutual[kind], known.ours.trusted(stranger))
    assert f"it refuses --tls-cert {stranger.cert}" in why and "--tls-client-ca" in why


def test_a_coordinator_whose_certificate_has_expired_is_told_so(
    artifact: Artifact, known: Authorities, shown: Shown
) -> None:
    old = known.ours.issue("late", "me", since=LONG_AGO, until=YESTERDAY)
    why = refused(artifact, shown.mutual[Transport.FAST], known.ours.trusted(old))
    assert f"refuses --tls-cert {old.cert}, which has expired: renew it" in why
    assert "certificate has expired" in shown.mutual[Transport.FAST].log_path.read_text()


def test_a_node_of_an_unknown_authority_is_not_trusted(
    artifact: Artifact, known: Authorities, shown: Shown
) -> None:
    why = refused(artifact, shown.elsewhere, known.theirs.trusted())
    assert "its certificate is not trusted" in why and "--tls-ca" in why


def test_a_node_whose_certificate_has_expired_is_told_apart(
    artifact: Artifact, known: Authorities, shown: Shown
) -> None:
    why = refused(artifact, shown.expired, known.ours.trusted())
    assert "its certificate has expired" in why and "reload" in why
    assert "the certificate has expired" in shown.expired.log_path.read_text()


def test_a_certificate_for_another_name_is_refused_and_the_name_can_be_said(
    artifact: Artifact, known: Authorities, shown: Shown
) -> None:
    why = refused(artifact, shown.elsewhere, known.ours.trusted())
    assert "its certificate is not for 127.0.0.1" in why and "--tls-server-name" in why
    with closing(meet(artifact, shown.elsewhere, known.ours.trusted(server_name="node.example"))):
        pass
    why = refused(artifact, shown.elsewhere, known.ours.trusted(server_name="node.elsewhere"))
    assert "its certificate is not for node.elsewhere" in why


@pytest.mark.parametrize(("kind", "transport"), list(itertools.product(KINDS, KINDS)))
def test_a_plain_coordinator_is_told_that_the_node_speaks_tls(
    artifact: Artifact, shown: Shown, kind: Transport, transport: Transport
) -> None:
    endpoint = shown.mutual[kind].endpoint.replace("grpcs://", "grpc://")
    with pytest.raises(errors.NodeUntrusted, match=r"speaks TLS: write grpcs://127\.0\.0\.1:"):
        meet(artifact, endpoint, None, transport=transport)


@pytest.mark.parametrize("kind", KINDS)
def test_a_coordinator_with_tls_is_told_that_the_node_speaks_none(
    artifact: Artifact, known: Authorities, shown: Shown, kind: Transport
) -> None:
    endpoint = shown.plain[kind].endpoint.replace("grpc://", "grpcs://")
    why = refused(artifact, endpoint, known.ours.trusted())
    assert "speaks no TLS: start it with --tls-cert and --tls-key, or write grpc://" in why


def test_nobody_there_is_no_matter_of_trust(artifact: Artifact, known: Authorities) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(errors.NodeUnreachable, match="is not reachable") as caught:
        meet(artifact, f"grpcs://127.0.0.1:{port}", known.ours.trusted())
    assert not isinstance(caught.value, errors.NodeUntrusted)


def test_what_cannot_carry_tls_is_refused_and_not_replaced(
    artifact: Artifact, path: Path, known: Authorities, shown: Shown
) -> None:
    node = shown.mutual[Transport.FAST]
    with pytest.raises(errors.UsageError, match="--transport fast carries no TLS"):
        meet(artifact, node, known.ours.trusted(), transport=Transport.FAST)
    with pytest.raises(errors.UsageError, match="grpcs://host:port, and it names none"):
        meet(artifact, shown.plain[Transport.FAST], known.ours.trusted())
    alone = shoal("run", path, "--prompt-ids", "1,2", "--tls-ca", known.ours.cert)
    assert_refused(alone, 2, "--tls-... needs --moe-shards")


def test_a_map_file_that_gains_tls_is_refused_and_one_that_has_it_may_change(
    artifact: Artifact, known: Authorities, shown: Shown, tmp_path: Path
) -> None:
    plain, mutual = shown.plain[Transport.FAST].endpoint, shown.mutual[Transport.FAST].endpoint
    file = tmp_path / "map.toml"

    def write(*endpoints: str) -> None:
        file.write_text(f'[[shard]]\nexperts = "0-15"\nendpoints = {list(endpoints)}\n')

    write(plain)
    with closing(open_remote_dispatch(artifact, f"@{file}")) as dispatch:
        write(plain, mutual)
        with pytest.raises(errors.ShardMapError, match="grpcs:// nodes cannot join a map"):
            dispatch.reload()
    files = known.ours.trusted(known.coordinator)
    with closing(open_remote_dispatch(artifact, f"@{file}", tls=files)) as dispatch:
        write(mutual)
        assert dispatch.reload() == mutual


@pytest.mark.parametrize("kind", KINDS)
def test_health_is_told_over_tls_to_unmodified_clients(
    known: Authorities, shown: Shown, kind: Transport
) -> None:
    target = shown.mutual[kind].endpoint.removeprefix("grpcs://")
    with grpc.secure_channel(target, credentials(known, known.ours)) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING


def credentials(known: Authorities, authority: Authority) -> grpc.ChannelCredentials:
    pair = known.coordinator
    return grpc.ssl_channel_credentials(
        authority.cert.read_bytes(), pair.key.read_bytes(), pair.cert.read_bytes()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_reload_shows_renewed_certificates_and_asks_for_them(
    path: Path, artifact: Artifact, tmp_path: Path, kind: Transport
) -> None:
    """1. Files are replaced, one pair half: refused. 2. Whole: the new pair, for new clients only.

    The connection from before goes on. The authority of clients is another afterwards, too.
    """
    before, after = Authority(tmp_path, "before"), Authority(tmp_path, "after")
    pair, client_ca = before.issue("node"), tmp_path / "clients.pem"
    client_ca.write_bytes(before.cert.read_bytes())
    me = {one: one.issue("me", "me") for one in (before, after)}
    with Cluster(kind) as cluster:
        node = cluster.node(path, extra=(*pair.flags, "--tls-client-ca", str(client_ca)))
        target = node.endpoint.removeprefix("grpcs://")
        shown = grpc.ssl_channel_credentials(
            before.cert.read_bytes(), me[before].key.read_bytes(), me[before].cert.read_bytes()
        )
        renewed = after.issue("node")
        with grpc.secure_channel(target, shown) as channel:
            assert not (reply := reload(channel)).error and not list(reply.changed)
            pair.cert.write_bytes(renewed.cert.read_bytes())
            assert "is not the key of" in reload(channel).error
            pair.key.write_bytes(renewed.key.read_bytes())
            client_ca.write_bytes(after.cert.read_bytes())
            assert list(reload(channel).changed) == [
                "TLS: certificate for localhost, 127.0.0.1, until 3000-01-01 00:00:00 UTC"
            ]
            assert not reload(channel).error, "the connection from before is cut"
        with closing(meet(artifact, node, after.trusted(me[after]))):
            pass
        assert "is not trusted" in refused(artifact, node, before.trusted(me[before]))
        assert "it refuses --tls-cert" in refused(artifact, node, after.trusted(me[before]))


def test_turning_tls_off_needs_a_new_start(path: Path, known: Authorities, tmp_path: Path) -> None:
    cert, key = known.node.cert, known.node.key
    config = tmp_path / "node.toml"
    config.write_text(f'tls-cert = "{cert}"\ntls-key = "{key}"\n')
    with Cluster(Transport.FAST) as cluster:
        node = cluster.node(path, extra=("--config", str(config)))
        roots = known.ours.cert.read_bytes()
        target = node.endpoint.removeprefix("grpcs://")
        with grpc.secure_channel(target, grpc.ssl_channel_credentials(roots)) as channel:
            config.write_text("")
            reply = reload(channel)
            assert not reply.error and not list(reply.changed)
            kept = f"tls-cert, tls-key, tls-client-ca: {cert}, {key} -> default"
            assert list(reply.kept) == [kept]


@pytest.mark.parametrize("kind", KINDS)
def test_who_is_silent_within_a_handshake_does_not_hold_a_node_that_leaves(
    path: Path, known: Authorities, kind: Transport
) -> None:
    with Cluster(kind) as cluster:
        node = cluster.node(path, extra=known.node.flags)
        host, _, port = node.endpoint.removeprefix("grpcs://").rpartition(":")
        with (
            socket.create_connection((host, int(port)), TIMEOUT_S),
            socket.create_connection((host, int(port)), TIMEOUT_S) as plain,
        ):
            plain.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9))
            while plain.recv(4096):
                pass
            node.send(signal.SIGTERM)
            node.wait()
            assert node.exit_status == 0
        if kind is Transport.FAST:
            assert "the peer speaks no TLS" in node.log_path.read_text()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--listen", "0.0.0.0:0"), ("no TLS", "--tls-client-ca")),
        (("--listen", "0.0.0.0:0", "CERT"), ("no --tls-client-ca", "--insecure")),
        (("--listen", "unix:///tmp/none", "CERT"), ("a Unix socket needs no TLS",)),
        (("--tls-cert", "/nowhere.pem"), ("--tls-cert needs --tls-cert and --tls-key",)),
        (("--tls-client-ca", "/nowhere.pem"), ("--tls-client-ca needs --tls-cert",)),
        (("CERT", "--tls-client-ca", "/nowhere.pem"), ("/nowhere.pem: cannot be read",)),
        (("--tls-cert", "/nowhere.pem", "--tls-key", "/nowhere.pem"), ("/nowhere.pem: cannot",)),
    ],
)
def test_a_node_does_not_start_with_tls_that_protects_nothing(
    path: Path, known: Authorities, flags: tuple[str, ...], words: tuple[str, ...]
) -> None:
    spread = [f for flag in flags for f in (known.node.flags if flag == "CERT" else (flag,))]
    listen = () if "--listen" in spread else ("--listen", "127.0.0.1:0")
    assert_refused(shoal("node", path, *listen, *spread), 2, *words)


def test_mutual_tls_may_listen_beyond_loopback(path: Path, known: Authorities) -> None:
    with Cluster() as cluster:
        node = cluster.node(path, listen="0.0.0.0:0", extra=mutual(known))
        assert "INSECURE" not in node.log_path.read_text()
