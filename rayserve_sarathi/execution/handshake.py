"""Prove to each other that both ends of a connection know a secret, without sending it.

The listener sends a challenge; the connecting end answers with a challenge of its own and a proof over both; the
listener ends with its proof. Each proof names who gives it, so that neither can be sent back as the other.

This keeps strangers out. It does not encrypt: who can read or change the network's packets can read and change steps.
"""

import hashlib
import hmac
import secrets

from rayserve_sarathi.errors import WireError

_MAGIC = b"SRTH-01\n"
_CHALLENGE_BYTES = 32
_PROOF_BYTES = 32
MIN_SECRET_BYTES = 16
GREETING_BYTES = len(_MAGIC) + _CHALLENGE_BYTES
ANSWER_BYTES = _CHALLENGE_BYTES + _PROOF_BYTES
CONFIRMATION_BYTES = _PROOF_BYTES


def make_secret() -> bytes:
    """Return a new secret for the processes of one pipeline."""
    return secrets.token_bytes(32)


class ListenerHandshake:
    """The listener's part: send `greeting`, then what `confirm` makes of the answer."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._challenge = secrets.token_bytes(_CHALLENGE_BYTES)

    @property
    def greeting(self) -> bytes:
        """What to send first, of `GREETING_BYTES`."""
        return _MAGIC + self._challenge

    def confirm(self, answer: bytes) -> bytes:
        """Return what to send to a peer that gave this answer, of `ANSWER_BYTES`.

        Raises:
            WireError: The peer does not know the secret.
        """
        peer_challenge, proof = answer[:_CHALLENGE_BYTES], answer[_CHALLENGE_BYTES:]
        transcript = self._challenge + peer_challenge
        if not hmac.compare_digest(proof, _proof(self._secret, b"connects", transcript)):
            raise WireError("it does not know the secret of this pipeline")
        return _proof(self._secret, b"listens", transcript)


class ConnectorHandshake:
    """The connecting end's part: send what `answer` makes of the greeting, then check the confirmation."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._challenge = secrets.token_bytes(_CHALLENGE_BYTES)
        self._transcript = b""

    def answer(self, greeting: bytes) -> bytes:
        """Return what to send to a listener with this greeting, of `GREETING_BYTES`.

        Raises:
            WireError: It is no listener of ours.
        """
        if not greeting.startswith(_MAGIC):
            raise WireError(f"it is no stage of this version: it begins with {greeting[: len(_MAGIC)]!r}")
        self._transcript = greeting[len(_MAGIC) :] + self._challenge
        return self._challenge + _proof(self._secret, b"connects", self._transcript)

    def check(self, confirmation: bytes) -> None:
        """Return if the listener knows the secret; `confirmation` is of `CONFIRMATION_BYTES`.

        Raises:
            WireError: It does not.
        """
        if not hmac.compare_digest(confirmation, _proof(self._secret, b"listens", self._transcript)):
            raise WireError("it does not know the secret of this pipeline")


def _proof(secret: bytes, role: bytes, transcript: bytes) -> bytes:
    return hmac.digest(secret, role + b"\0" + transcript, hashlib.sha256)
