"""All checks of a node, in the order of the table."""

from __future__ import annotations

from collections.abc import Sequence

from stagemesh.client.doctor.finding import Finding
from stagemesh.client.doctor.gpus import check_gpus, has_gpus
from stagemesh.client.doctor.limits import check_limits
from stagemesh.client.doctor.peer import check_peer
from stagemesh.client.doctor.ports import check_port
from stagemesh.client.doctor.versions import check_versions

DEFAULT_PORTS = {
    "stage": ("127.0.0.1:50061",),
    "router": ("127.0.0.1:50051", "127.0.0.1:50052"),
    "client": (),
}
"""What a role listens on unless it is told otherwise; a test holds them equal to the settings' defaults."""


def examine(
    role: str,
    *,
    listen: Sequence[str] = (),
    peers: Sequence[str] = (),
    device: str = "auto",
    seconds: float = 1.0,
) -> list[Finding]:
    """The findings for a node that is to be a `role`.

    Args:
        role: stage, router or client.
        listen: Addresses it will listen on; none: the role's defaults.
        peers: HOST or HOST:PORT of nodes it will talk to.
        device: auto, cpu or cuda: with cuda, having no GPU is a failure; with cpu none is looked for.
        seconds: For the bandwidth to a peer, each way, at most; 0 leaves it out.
    """
    gpus = role == "stage" and device != "cpu" and has_gpus()
    findings = check_versions(role)
    if device != "cpu":
        findings += check_gpus(role, wanted=device == "cuda")
    findings += check_limits(role, gpus=gpus)
    findings += [check_port(address) for address in listen or DEFAULT_PORTS[role]]
    for peer in peers:
        findings += check_peer(peer, seconds=seconds)
    return findings
