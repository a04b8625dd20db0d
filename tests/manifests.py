"""What deploy/helm renders to, by Helm's own engine, and the base for Kustomize.

    python -m tests.manifests

writes deploy/kubernetes anew; a test holds it to the chart.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.images import ROOT

CHART = ROOT / "deploy" / "helm" / "opticnerve"
KUBERNETES = ROOT / "deploy" / "kubernetes"
NAME = "opticnerve"  # Of the release, and of its namespace.
HEADER = "# Rendered from deploy/helm/opticnerve: python -m tests.manifests\n"
SCALED = {"autoscaling": {"enabled": True}}
AUTOSCALED = {
    "encoderDefaults": SCALED,
    "llmDefaults": SCALED,
    "monitoring": {"serviceMonitor": {"enabled": True}},
}
# Values of the chart's example: pools, GPUs, TLS and autoscaling.
EXAMPLE: dict[str, Any] = yaml.safe_load((CHART / "examples" / "gpu.yaml").read_text())
# Templates of what only clusters with KEDA and the Prometheus operator know.
OPERATED = ("scaledobjects.yaml", "servicemonitor.yaml")

Manifest = dict[str, Any]


class RenderError(Exception):
    """The chart refuses its values."""


def render(values: Manifest | None = None) -> dict[str, list[Manifest]]:
    """The manifests of each template, with ``values`` over the chart's own. Raises RenderError.

    Helm's engine is a library with a runtime of its own, so it has a process of its own.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.manifests", "render"],
        input=json.dumps(values or {}), capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    if done.returncode:
        raise RenderError(done.stderr)
    return {name: read(text) for name, text in json.loads(done.stdout).items()}


def read(text: str) -> list[Manifest]:
    return [manifest for manifest in yaml.safe_load_all(text) if manifest]


def kustomize_files() -> dict[str, str]:
    """The rendered files below deploy/kubernetes, by their paths."""
    plain, scaled = render(), render(AUTOSCALED)
    files = {f"base/{name}": plain[name] for name in plain if plain[name]}
    files |= {f"autoscaled/{name}": scaled[name] for name in OPERATED}
    return {
        path: HEADER + yaml.safe_dump_all(manifests, sort_keys=False, width=100)
        for path, manifests in files.items()
    }


def main() -> None:
    import helm_python

    if sys.argv[1:] != ["render"]:
        for path, text in kustomize_files().items():
            (KUBERNETES / path).write_text(text)
        return
    with helm_python.Chart.load(CHART) as chart:
        values = json.load(sys.stdin)
        try:
            chart.validate_schema(values)
            rendered = chart.render(values, name=NAME, namespace=NAME)
        except helm_python.HelmError as error:
            sys.exit(str(error))
    manifests = {Path(path).name: text for path, text in rendered.items() if path.endswith("yaml")}
    print(json.dumps(manifests))


if __name__ == "__main__":
    main()
