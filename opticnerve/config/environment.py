"""Variables that Kubernetes sets in every pod, as against those that configure OpticNerve."""

from __future__ import annotations

import re
from collections.abc import Mapping

PREFIX = "OPTICNERVE_"
_IP, _PROTOCOL = r"[0-9A-Fa-f.:\[\]]+", "(?:tcp|udp|sctp)"
_SERVICE_LINK = re.compile(
    rf"{PREFIX}(?:[A-Z0-9_]+_)?(?:"
    rf"SERVICE_HOST={_IP}"
    r"|SERVICE_PORT(?:_[A-Z0-9_]+)?=\d+"
    rf"|PORT(?:_\d+_(?:TCP|UDP|SCTP))?={_PROTOCOL}://{_IP}:\d+"
    rf"|PORT_\d+_(?:TCP|UDP|SCTP)_(?:PROTO={_PROTOCOL}|PORT=\d+|ADDR={_IP})"
    r")"
)


def is_service_link(name: str, value: str) -> bool:
    """Whether a variable is a service link: what Kubernetes tells every pod about a Service whose
    name begins with ``opticnerve``, such as ``OPTICNERVE_PORT=tcp://10.0.0.1:80``.

    Name and value both count, so ``OPTICNERVE_PORT=8000`` is an option of ours.
    Source: https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
    """
    return bool(_SERVICE_LINK.fullmatch(f"{name}={value}"))


def without_service_links(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if not is_service_link(name, value)}
