"""What a server is told: where it listens, what it computes with, and what a client may ask of it."""

from dataclasses import dataclass, field
from ipaddress import ip_address

from sightline.errors import UserError


@dataclass(frozen=True)
class Settings:
    """How to serve. Sizes are in megabytes (10^6 bytes), times in seconds. Raises UserError for values out of range.

    Each request has to come with the key where there is one; a server beyond this machine needs one. `allow_hosts` are
    further names under which it may be asked. `batch_size` images of different requests are computed together at most;
    with 1, requests are computed apart, so that no answer depends on what else is asked. None is 1 on CPUs, which gain
    nothing from it, and 32 elsewhere.
    """

    host: str = field(
        default="127.0.0.1",
        metadata={"help": "address to listen on, 127.0.0.1 unless given; any but loopback needs a key"},
    )
    port: int = field(default=8000, metadata={"help": "port to listen on, 8000 unless given; 0 takes a free one"})
    api_key: str | None = field(
        default=None, metadata={"help": "what clients have to send; better in SIGHTLINE_API_KEY, which `ps` hides"}
    )
    allow_hosts: tuple[str, ...] = ()
    batch_size: int | None = field(
        default=None, metadata={"help": "most images of different requests computed together: 1 on CPUs, 32 elsewhere"}
    )
    max_images: int = field(default=32, metadata={"help": "most images in a request (32)"})
    max_megabytes: float = field(default=20.0, metadata={"help": "largest request (20)"})
    queue: int = field(default=256, metadata={"help": "most images that wait (256)"})
    max_wait: float = field(
        default=10.0, metadata={"help": "longest wait, in seconds, for which a request is taken (10)"}
    )
    deadline: float = field(default=60.0, metadata={"help": "seconds after which a request is given up (60)"})
    header_seconds: float = 5.0
    idle_seconds: float = 12.0
    bytes_per_second: float = 1000.0
    connections: int = 4096

    def __post_init__(self) -> None:
        least = {"port": 0, "batch_size": 1, "max_images": 1, "queue": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise UserError(f"--{name.replace('_', '-')} has to be at least {low}, and is {value}")
        for name in ("max_megabytes", "max_wait", "deadline"):
            if not 0 < getattr(self, name) < 1e6:
                raise UserError(f"--{name.replace('_', '-')} has to be positive, and is {getattr(self, name)}")
        if self.port > 65535:
            raise UserError(f"--port has to be at most 65535, and is {self.port}")
        if self.api_key is not None and (len(self.api_key) < 16 or not self.api_key.isascii()):
            raise UserError("the API key has to have at least 16 characters, all of them ASCII")
        if self.api_key is None and not is_loopback(self.host):
            raise UserError(
                f"--host {self.host} can be reached from other machines: set a key in SIGHTLINE_API_KEY, or listen on "
                "127.0.0.1"
            )

    @property
    def max_bytes(self) -> int:
        """The largest body of a request."""
        return int(self.max_megabytes * 1e6)


def is_loopback(host: str) -> bool:
    """Whether an address, or `localhost`, is this machine's own."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
