"""What ranks tell each other through their store: typed values, signed with a secret of the run.

Whoever reaches the store's port can write into it. A value is taken only if a rank of this run has signed it, for the
name under which it is found, and nothing in it is ever executed. Owns the secret, the signature and the form of values.
torch is imported only once ranks meet. Does not know what is told.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from penstock.distributed.launcher import SECRET, is_launched
from penstock.errors import GenerationError

if TYPE_CHECKING:
    import torch.distributed as dist

T = TypeVar("T")
_DIGEST_BYTES = 32
_agreed: tuple[dist.ProcessGroup, bytes] | None = None


def agree_on_secret() -> None:
    """Draw the secret of this run, together with all ranks of the default group; once per group.

    Rank 0 draws a number; whoever has it and `PENSTOCK_SECRET`, where the user has set that, has the secret. Ranks of
    our own launcher have got one already.

    Cost: one exchange of 32 bytes on the CPU.
    """
    import torch
    import torch.distributed as dist

    global _agreed
    group = dist.group.WORLD
    if group is None or is_launched() or (_agreed is not None and _agreed[0] is group):
        return
    drawn = torch.tensor(list(secrets.token_bytes(_DIGEST_BYTES)), dtype=torch.uint8)
    dist.broadcast(drawn, 0)
    _agreed = group, hmac.digest(_given(), bytes(drawn.tolist()), hashlib.sha256)


def run_secret() -> bytes:
    """The secret of this run: what the ranks agreed on, else `PENSTOCK_SECRET`; empty where there is neither."""
    import torch.distributed as dist

    if _agreed is not None and dist.is_initialized() and _agreed[0] is dist.group.WORLD:
        return _agreed[1]
    return _given()


def _given() -> bytes:
    return os.environ.get(SECRET, "").encode()


class Signer:
    """Writes and reads values that are signed.

    Args:
        secret: of the run.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def write(self, name: str, value: Any) -> bytes:
        """A value's bytes: its signature, then msgpack.

        Args:
            name: under which it can be found, and under no other.
            value: what msgspec takes: numbers, texts, bytes, lists, mappings, dataclasses.

        Raises:
            TypeError: for anything else.
        """
        content = msgspec.msgpack.encode(value)
        return self._digest(name, content) + content

    def read(self, name: str, data: bytes, kind: type[T]) -> T:
        """The value that a rank has written.

        Args:
            name: under which it was found.
            data: what was found.
            kind: of which type it is.

        Raises:
            GenerationError: for what no rank of this run has written, or is of another type.
        """
        digest, content = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        if not hmac.compare_digest(digest, self._digest(name, content)):
            raise GenerationError(
                f"{name!r} in the store of the ranks ({len(data)} bytes) is not signed with the secret of this run: "
                f"somebody else who reaches its port has written it, or {SECRET} differs between the ranks. Close the "
                "port to others, give all ranks the same secret, and start all of them again."
            )
        try:
            return msgspec.msgpack.decode(content, type=kind)
        except msgspec.MsgspecError as error:
            raise GenerationError(
                f"{name!r} in the store of the ranks is not what this version of penstock writes: {error}. Run the "
                "same version on all ranks."
            ) from error

    def _digest(self, name: str, content: bytes) -> bytes:
        return hmac.digest(self._secret, name.encode() + b"\0" + content, hashlib.sha256)
