"""Certificates and keys in files: what is wrong with them is said, with the file and the fix."""

import time
from pathlib import Path

import pytest

from coordinator.tls import Trust
from shoal.errors import UsageError
from shoal.tls import ClientTls, ServerTls
from shoal.tls_files import ClientFiles, ServerFiles
from support.certificates import LONG_AGO, YESTERDAY, Authority, Pair


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"), "ours")


@pytest.fixture(scope="module")
def pair(authority: Authority) -> Pair:
    return authority.issue("node", "node.example", "127.0.0.1")


def test_a_certificate_is_read_with_its_names_and_its_end(authority: Authority, pair: Pair) -> None:
    tls = ServerTls.read(ServerFiles(pair.cert, pair.key, authority.cert))
    assert tls.names == ("node.example", "127.0.0.1") and not tls.is_expired
    assert str(tls).startswith("certificate for node.example, 127.0.0.1, until 3000-01-01")
    assert "PRIVATE" not in repr(tls)
    assert tls.shows_the_same(ServerTls.read(tls.files)) and not tls.shows_the_same(None)
    assert not tls.shows_the_same(ServerTls.read(ServerFiles(pair.cert, pair.key)))


def test_one_that_has_expired_is_read_and_known_to_be(authority: Authority) -> None:
    old = authority.issue("old", since=LONG_AGO, until=YESTERDAY)
    tls = ServerTls.read(ServerFiles(old.cert, old.key))
    assert tls.is_expired and 0 < time.time() - tls.expires_s < 3 * 86_400


def broken(folder: Path, pair: Pair, what: str) -> tuple[Path, Path]:
    """Return the pair's files, one of them spoiled."""
    cert, key, spoiled = pair.cert, pair.key, folder / "spoiled.pem"
    pem = cert.read_bytes()
    match what:
        case "missing cert":
            return folder / "nowhere.pem", key
        case "missing key":
            return cert, folder / "nowhere.pem"
        case "folder":
            return folder, key
        case "swapped":
            return key, cert
        case "cut":
            spoiled.write_bytes(pem[: len(pem) // 2])
            return spoiled, key
        case "garbled":
            spoiled.write_bytes(pem[:28] + b"AAAA" + pem[32:])
            return spoiled, key
        case "huge":
            spoiled.write_bytes(pem + bytes(2**20))
            return spoiled, key
        case "passphrase":
            spoiled.write_bytes(key.read_bytes().replace(b"EC PRIVATE", b"ENCRYPTED PRIVATE"))
            return cert, spoiled
    raise AssertionError(what)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("missing cert", r"--tls-cert .*nowhere.pem: cannot be read: No such file"),
        ("missing key", r"--tls-key .*nowhere.pem: cannot be read: No such file"),
        ("folder", r"--tls-cert .*: cannot be read: Is a directory"),
        ("swapped", r"--tls-cert .*node.key: holds no certificate in PEM form"),
        ("cut", r"--tls-cert .*spoiled.pem and --tls-key .*node.key cannot be used"),
        ("garbled", r"--tls-cert .*spoiled.pem and --tls-key .*node.key cannot be used"),
        ("huge", r"--tls-cert .*spoiled.pem: more than 1048576 bytes"),
        ("passphrase", r"--tls-key .*spoiled.pem: has a passphrase, and nobody .*openssl pkey"),
    ],
)
def test_files_that_cannot_be_used_are_named(
    tmp_path: Path, pair: Pair, what: str, words: str
) -> None:
    cert, key = broken(tmp_path, pair, what)
    with pytest.raises(UsageError, match=words):
        ServerTls.read(ServerFiles(cert, key))
    with pytest.raises(UsageError, match=words):
        ClientTls.read(ClientFiles(pair.cert, cert, key))


def test_a_key_of_another_certificate_is_refused(authority: Authority, pair: Pair) -> None:
    other = authority.issue("other")
    with pytest.raises(UsageError, match=r"other.key is not the key of --tls-cert .*node.pem"):
        ServerTls.read(ServerFiles(pair.cert, other.key))


def test_an_authority_s_file_must_hold_certificates(tmp_path: Path, pair: Pair) -> None:
    spoiled = tmp_path / "ca.pem"
    spoiled.write_bytes(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    with pytest.raises(UsageError, match=r"--tls-client-ca .*ca.pem: no usable certificate"):
        ServerTls.read(ServerFiles(pair.cert, pair.key, spoiled))
    with pytest.raises(UsageError, match=r"--tls-ca .*ca.pem: no usable certificate"):
        ClientTls.read(ClientFiles(spoiled))
    with pytest.raises(UsageError, match=r"--tls-ca .*node.key: holds no certificate"):
        ClientTls.read(ClientFiles(pair.key))


def test_a_certificate_needs_its_key(pair: Pair) -> None:
    with pytest.raises(UsageError, match="--tls-cert needs --tls-key"):
        ClientFiles(cert=pair.cert)
    with pytest.raises(UsageError, match="--tls-key needs --tls-cert"):
        ClientFiles(key=pair.key)


def test_a_coordinator_s_files_are_read_again_when_they_change_and_kept_when_they_are_wrong(
    tmp_path: Path, authority: Authority, pair: Pair
) -> None:
    told: list[str] = []
    copy = Pair(tmp_path / "me.pem", tmp_path / "me.key")
    copy.replace(pair)
    trust = Trust(ClientFiles(authority.cert, copy.cert, copy.key), told.append)
    before = trust.current()
    assert trust.current() is before
    other = authority.issue("renewed", "node.example")
    copy.cert.write_bytes(other.cert.read_bytes())
    assert trust.current() is before and "is not the key of" in told[0]
    assert trust.current() is before and len(told) == 1, "told once"
    copy.replace(other)
    assert trust.current().cert == other.cert.read_bytes()


def test_without_a_file_the_system_s_authorities_are_trusted(
    authority: Authority, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.cert))
    assert ClientTls.read(ClientFiles()).roots.strip() == authority.cert.read_bytes().strip()
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    with pytest.raises(UsageError, match=r"this system trusts no authority .* --tls-ca"):
        ClientTls.read(ClientFiles())
    (tmp_path / "0a1b2c3d.0").write_bytes(authority.cert.read_bytes())
    assert ClientTls.read(ClientFiles()).roots.strip() == authority.cert.read_bytes().strip()
