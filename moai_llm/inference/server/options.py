"""What the operator of a server chooses, and which choices are refused."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from moai_llm.runtime import MoaiError

KEY_VARIABLE = "MOAI_API_KEY"


@dataclass(frozen=True)
class Options:
    """
    Attributes:
        name: what requests call the model.
        api_key: None lets everybody in, on this machine only.
        cors_origins: pages of other origins whose scripts may ask; none by default.
        max_batch: answers that grow at the same time.
        max_queue: answers that wait for a place; one more gets 429.
        max_new_tokens: the longest answer anyone gets.
        timeout: seconds an answer may take, waiting included.
        max_body: bytes of a request.
        grace: seconds that running answers have at shutdown.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str = "moai"
    api_key: str | None = None
    cors_origins: tuple[str, ...] = ()
    max_batch: int = 16
    max_queue: int = 128
    max_new_tokens: int = 1024
    timeout: float = 300.0
    max_body: int = 4 << 20
    grace: float = 10.0

    def __post_init__(self) -> None:
        checks = {
            "--port": 0 <= self.port <= 65535, "--max-batch": self.max_batch >= 1, "--max-queue": self.max_queue >= 0,
            "--max-new-tokens": self.max_new_tokens >= 1, "--timeout": self.timeout > 0, "--grace": self.grace >= 0,
            "--max-body-mb": self.max_body >= 1024, "--name": bool(self.name) and self.name.isprintable(),
        }  # fmt: skip
        for flag, fine in checks.items():
            if not fine:
                raise MoaiError(f"{flag} is out of range")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise MoaiError("an API key is a word of printable ASCII characters")
        if self.api_key is None and not is_loopback(self.host):
            raise MoaiError(
                f"{self.host} can be reached from other machines, and there is no API key: set {KEY_VARIABLE} (or "
                "--api-key KEY), or serve on 127.0.0.1 only"
            )
        for origin in self.cors_origins:
            if origin != "*" and (not origin.startswith(("http://", "https://")) or origin.count("/") != 2):
                raise MoaiError(f"--cors-origin {origin} is no origin: write it as https://chat.example.com, or *")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:  # another name: it may resolve to anything
        return False
