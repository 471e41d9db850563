"""A peer's key: the file it lives in, the peer id it gives, signatures made and checked with it.

Keys are Ed25519 in libp2p's protobuf form; RSA files of older swarms are read too. The peer id is
derived from the public key, so a signature with the key proves the peer id. Also reads and writes
the swarm key file, the other secret on disk. Must not know network and torch.
"""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey

from petals.errors import ConfigError
from petals.swarm.membership import SwarmKey
from petals.types import PeerId
from petals.wire import varint

_RSA, _ED25519 = 0, 1
_MAX_KEY_BYTES = 8192
"""Longest key file."""

_IDENTITY_MULTIHASH_MAX_BYTES = 42
"""A public key up to this length is its own peer id; a longer one is hashed (libp2p's rule)."""

_MAX_RSA_EXPONENT = 2**32
"""A larger exponent would make checking a signature slow."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A key pair. ``public_key`` is the libp2p protobuf form, which travels with records."""

    peer_id: PeerId
    public_key: bytes
    _private: Ed25519PrivateKey | RSAPrivateKey

    def __repr__(self) -> str:
        return f"Identity({self.peer_id})"

    def sign(self, data: bytes) -> bytes:
        """Signature of ``data``: Ed25519, or RSA PKCS #1 v1.5 with SHA-256."""
        if isinstance(self._private, Ed25519PrivateKey):
            return self._private.sign(data)
        return self._private.sign(data, padding.PKCS1v15(), hashes.SHA256())

    def to_bytes(self) -> bytes:
        """The key file's content (libp2p protobuf PrivateKey)."""
        if isinstance(self._private, Ed25519PrivateKey):
            raw = self._private.private_bytes_raw() + self._private.public_key().public_bytes_raw()
            return _pack(_ED25519, raw)
        der = self._private.private_bytes(
            serialization.Encoding.DER,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        )
        return _pack(_RSA, der)

    @classmethod
    def generate(cls) -> "Identity":
        """A new Ed25519 identity."""
        return cls._of(Ed25519PrivateKey.generate())

    @classmethod
    def from_bytes(cls, data: bytes) -> "Identity":
        """The content of a key file -> identity. Raises ConfigError if it is not an Ed25519 or RSA
        libp2p key.
        """
        try:
            kind, raw = _unpack(data)
            if kind == _ED25519 and len(raw) in (64, 96):
                return cls._of(Ed25519PrivateKey.from_private_bytes(raw[:32]))
            private = serialization.load_der_private_key(raw, password=None)
        except (ValueError, TypeError) as error:
            raise _bad_key(str(error)) from error
        if kind != _RSA or not isinstance(private, RSAPrivateKey):
            raise _bad_key("only Ed25519 and RSA keys are supported")
        return cls._of(private)

    @classmethod
    def _of(cls, private: Ed25519PrivateKey | RSAPrivateKey) -> "Identity":
        if isinstance(private, Ed25519PrivateKey):
            public = _pack(_ED25519, private.public_key().public_bytes_raw())
        else:
            der = private.public_key().public_bytes(
                serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
            )
            public = _pack(_RSA, der)
        return cls(peer_id_of(public), public, private)


def peer_id_of(public_key: bytes) -> PeerId:
    """libp2p protobuf public key -> peer id: the key itself if it is short, else its SHA-256, as a
    base58 multihash.
    """
    if len(public_key) <= _IDENTITY_MULTIHASH_MAX_BYTES:
        multihash = b"\x00" + bytes([len(public_key)]) + public_key
    else:
        multihash = b"\x12\x20" + hashlib.sha256(public_key).digest()
    return PeerId(base58.b58encode(multihash).decode())


def verify(public_key: bytes, data: bytes, signature: bytes) -> bool:
    """True if ``signature`` of ``data`` was made with the private half of ``public_key``; False for
    any garbage.
    """
    try:
        kind, raw = _unpack(public_key)
        if kind == _ED25519:
            Ed25519PublicKey.from_public_bytes(raw).verify(signature, data)
            return True
        key = serialization.load_der_public_key(raw)
        if not isinstance(key, RSAPublicKey) or not 2048 <= key.key_size <= 8192:
            return False
        if key.public_numbers().e >= _MAX_RSA_EXPONENT:
            return False
        key.verify(signature, data, padding.PKCS1v15(), hashes.SHA256())
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def load_or_create_identity(path: Path) -> Identity:
    """The identity in ``path``; a missing file is created with a new Ed25519 key, readable by its
    owner only.

    Raises ConfigError if the file is no key or cannot be written.
    """
    try:
        return Identity.from_bytes(path.read_bytes()[: _MAX_KEY_BYTES + 1])
    except FileNotFoundError:
        identity = Identity.generate()
        write_secret(path, identity.to_bytes())
        return identity
    except OSError as error:
        raise ConfigError(f"The identity file {path} cannot be read: {error.strerror}.") from error


@contextlib.contextmanager
def sole_user(path: Path) -> Iterator[None]:
    """Be the only process on this machine that uses the identity file, until the context ends.

    Two members with one peer id would overwrite each other's records and take each other's streams.
    Raises ConfigError if another process, or another node of this one, uses the file.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"Another process uses the identity {path}.",
                hint="Give every server an identity file of its own. A server that leaves uses its "
                "file until it has stopped.",
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


def load_swarm_key(path: Path) -> SwarmKey:
    """The swarm key in ``path``. Raises ConfigError if there is none."""
    try:
        return SwarmKey.parse(path.read_text(encoding="utf-8")[:4096])
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"The swarm key file {path} cannot be read.",
            hint="Ask the operator of the swarm for it, or make one: petals swarm new-key FILE.",
        ) from error


def create_swarm_key(path: Path) -> SwarmKey:
    """A new random key, written to ``path`` for its owner only. Raises ConfigError if the file
    exists.
    """
    key = SwarmKey.generate()
    write_secret(path, key.format().encode())
    return key


def write_secret(path: Path, data: bytes) -> None:
    """Create ``path`` with mode 0600 and this content. Raises ConfigError if it exists or cannot be
    written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise ConfigError(f"The key file {path} cannot be created: {error.strerror}.") from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise ConfigError(f"The key file {path} cannot be written: {error.strerror}.") from error


def _bad_key(reason: str) -> ConfigError:
    return ConfigError(
        f"The identity file does not hold a peer's key: {reason}.",
        hint="Move the file away to get a new identity, or restore it from a backup.",
    )


def _pack(kind: int, data: bytes) -> bytes:
    """Protobuf ``{1: kind, 2: data}``, libp2p's form of public and private keys."""
    return bytes([0x08, kind, 0x12]) + varint.encode(len(data)) + data


def _unpack(message: bytes) -> tuple[int, bytes]:
    """The inverse of ``_pack``. Raises ValueError."""
    if not 4 <= len(message) <= _MAX_KEY_BYTES or message[0] != 0x08 or message[2] != 0x12:
        raise ValueError("not a libp2p key")
    length, num_bytes = varint.decode(message[3:])
    data = message[3 + num_bytes :]
    if len(data) != length:
        raise ValueError("libp2p key of the wrong length")
    return message[1], data
