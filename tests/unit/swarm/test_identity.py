import stat

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from petals.errors import ConfigError
from petals.swarm.config import NodeConfig
from petals.swarm.identity import (
    Identity,
    create_swarm_key,
    load_or_create_identity,
    load_swarm_key,
    peer_id_of,
    sole_user,
    verify,
)
from petals.swarm.node import SwarmNode


def rsa_file() -> bytes:
    """A key file as older swarms wrote it: libp2p protobuf around a PKCS #1 key."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    der = key.private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )
    return libp2p_rsa(der)


def slow_rsa_key() -> bytes:
    """An exponent of 1024 bits would make each check slow."""
    key = rsa.RSAPublicNumbers(e=2**1024 + 1, n=2**2048 - 1).public_key()
    info = serialization.PublicFormat.SubjectPublicKeyInfo
    return libp2p_rsa(key.public_bytes(serialization.Encoding.DER, info))


def libp2p_rsa(der: bytes) -> bytes:
    return b"\x08\x00\x12" + bytes([len(der) & 0x7F | 0x80, len(der) >> 7]) + der


def test_missing_file_is_created_for_its_owner_only(tmp_path):
    path = tmp_path / "keys" / "identity"
    created = load_or_create_identity(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_or_create_identity(path).peer_id == created.peer_id
    assert created.peer_id.startswith("12D3KooW")


@pytest.mark.parametrize("make", [lambda: Identity.generate().to_bytes(), rsa_file])
def test_signatures(make):
    identity = Identity.from_bytes(make())
    assert Identity.from_bytes(identity.to_bytes()).peer_id == identity.peer_id
    assert peer_id_of(identity.public_key) == identity.peer_id
    signature = identity.sign(b"data")
    assert verify(identity.public_key, b"data", signature)
    assert not verify(identity.public_key, b"other data", signature)
    assert not verify(identity.public_key, b"data", signature[:-1] + bytes([signature[-1] ^ 1]))
    assert not verify(Identity.generate().public_key, b"data", signature)


def test_peer_ids_are_those_of_libp2p():
    """Vectors of the libp2p specification (peer-ids)."""
    ed25519 = bytes.fromhex(
        "080112407e0830617c4a7de83925dfb2694556b12936c477a0e1feb2e148ec9da60fee7d"
        "1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e"
    )
    public = bytes.fromhex(
        "080112201ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e"
    )
    assert Identity.from_bytes(ed25519).public_key == public


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"\x08\x01\x12\x05abcde", b"\x08\x02\x12\x04abcd", b"\x08\x00\x12\x04abcd"],
)
def test_damaged_file_is_refused_and_kept(tmp_path, content):
    path = tmp_path / "identity"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="identity file") as caught:
        load_or_create_identity(path)
    assert "new identity" in caught.value.hint
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "key",
    [b"", b"\x08", b"\x08\x01\x12\x00", b"\x08\x00\x12\x04abcd", b"x" * 99, slow_rsa_key()],
)
def test_garbage_and_slow_public_keys_verify_nothing(key):
    assert not verify(key, b"data", b"s" * 256)


def test_swarm_key_file(tmp_path):
    path = tmp_path / "swarm.key"
    key = create_swarm_key(path)
    assert load_swarm_key(path) == key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert key.secret.hex() not in repr(key)
    with pytest.raises(ConfigError):
        create_swarm_key(path)
    with pytest.raises(ConfigError):
        load_swarm_key(tmp_path / "nothing")
    path.write_bytes(b"\xff\xfe nonsense")
    with pytest.raises(ConfigError):
        load_swarm_key(path)


def test_an_identity_has_one_user(tmp_path):
    path = tmp_path / "id"
    load_or_create_identity(path)
    with sole_user(path):
        with pytest.raises(ConfigError, match="Another process uses the identity") as caught:
            with sole_user(path):
                pass
        assert "file of its own" in caught.value.hint
        assert load_or_create_identity(path)  # a command may still say what the peer id is
    with sole_user(path):
        pass


async def test_a_second_node_of_one_identity_is_refused_until_the_first_has_left(tmp_path, net):
    config = NodeConfig(identity_path=tmp_path / "id")
    async with SwarmNode(config, engine=net.engine, clock=net.clock):
        with pytest.raises(ConfigError, match="Another process uses"):
            async with SwarmNode(config, engine=net.engine, clock=net.clock):
                pass
    async with SwarmNode(config, engine=net.engine, clock=net.clock):
        pass
