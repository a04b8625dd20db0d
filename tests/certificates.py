"""Real certificates for tests, made by the ``openssl`` command."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Pair:
    """A certificate and its key."""

    certificate: str
    key: str


class Authority:
    """Signs certificates, in files of ``directory``."""

    def __init__(self, directory: Path, name: str = "ca") -> None:
        self.directory = directory
        self._own = self._files(name)
        _openssl("-x509", "-subj", f"/CN={name}", *_output(self._own))
        self.certificate = self._own.certificate

    def issue(self, name: str, *hosts: str) -> Pair:
        """A certificate for ``hosts``: names, or IP addresses (``127.0.0.1`` by default). One that
        was issued under ``name`` is replaced, as whoever renews it would."""
        names = ",".join(
            f"{'IP' if host[0].isdigit() else 'DNS'}:{host}" for host in hosts or ("127.0.0.1",)
        )
        pair = self._files(name)
        _openssl(
            "-x509",
            *("-CA", self._own.certificate, "-CAkey", self._own.key),
            *("-subj", f"/CN={name}", "-addext", f"subjectAltName={names}"),
            *("-addext", "basicConstraints=critical,CA:FALSE"),
            *_output(pair),
        )
        return pair

    def issue_expired(self, name: str) -> Pair:
        """A certificate whose time is long over, of which only ``openssl ca`` makes one."""
        pair, request = self._files(name), str(self.directory / f"{name}.csr")
        config, index = self.directory / "ca.cnf", self.directory / "index.txt"
        index.touch()
        config.write_text(
            f"[ca]\ndefault_ca=own\n[own]\ndatabase={index}\nnew_certs_dir={self.directory}\n"
            "default_md=sha256\npolicy=any\nrand_serial=yes\n[any]\ncommonName=supplied\n"
        )
        _openssl("-subj", f"/CN={name}", "-keyout", pair.key, "-out", request)
        _run(
            *("ca", "-batch", "-notext", "-config", str(config), "-in", request),
            *("-cert", self._own.certificate, "-keyfile", self._own.key),
            *("-startdate", "20200101000000Z", "-enddate", "20200102000000Z"),
            *("-out", pair.certificate),
        )
        return pair

    def _files(self, name: str) -> Pair:
        return Pair(str(self.directory / f"{name}.pem"), str(self.directory / f"{name}.key"))


def _output(pair: Pair) -> tuple[str, ...]:
    return ("-keyout", pair.key, "-out", pair.certificate)


def _openssl(*arguments: str) -> None:
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")
    days = ("-days", "2") if "-x509" in arguments else ()
    _run("req", *days, "-nodes", *curve, *arguments)


def _run(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)
