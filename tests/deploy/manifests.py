"""Checks of Kubernetes manifests against the schemas of Kubernetes and of projects with custom resources.

The custom schemas have tens of thousands of lines and are not part of this repository. `UNROLL_CRDS` names a folder
with the published CustomResourceDefinitions of KServe (config/crd/full) and the Prometheus operator.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_MISSING = "kubernetes-validate is missing: make deploy-tools"
yaml = pytest.importorskip("yaml", reason=_MISSING)
jsonschema = pytest.importorskip("jsonschema", reason=_MISSING)
kubernetes_validate = pytest.importorskip("kubernetes_validate", reason=_MISSING)

ROOT = Path(__file__).parents[2]
#: The oldest supported Kubernetes version, and the newest with available schemas.
KUBERNETES = ("1.30", "1.37")

Manifest = dict[str, Any]


def documents(text: str) -> list[Manifest]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return [document for document in yaml.load_all(text, loader) if document]


def check(manifest: Manifest) -> None:
    """Raise if a field is missing, unknown, or of the wrong type."""
    for version in KUBERNETES:
        with _short_message():
            kubernetes_validate.validate(manifest, version, strict=True)


def check_custom(manifest: Manifest) -> None:
    """Check a custom resource as `check` does, or skip the test if its definition is not available."""
    group, _, version = manifest["apiVersion"].partition("/")
    for schema in _schemas(group, manifest["kind"], version):
        with _short_message():
            jsonschema.validate(manifest, _strict(schema))
        return
    pytest.skip(f"UNROLL_CRDS names no folder with the definition of {manifest['kind']} of {group}/{version}")


@contextmanager
def _short_message() -> Iterator[None]:
    """Reduce a validation error, which prints the whole schema, to the fault and its path."""
    try:
        yield
    except jsonschema.ValidationError as error:
        pytest.fail(f"{error.json_path}: {error.message}", pytrace=False)


def _schemas(group: str, kind: str, version: str) -> Iterator[Manifest]:
    if "UNROLL_CRDS" not in os.environ:
        return
    for path in Path(os.environ["UNROLL_CRDS"]).glob("*.yaml"):
        for definition in documents(path.read_text()):
            spec = definition.get("spec", {})
            if (spec.get("group"), spec.get("names", {}).get("kind")) == (group, kind):
                yield from (v["schema"]["openAPIV3Schema"] for v in spec["versions"] if v["name"] == version)


def _strict(schema: Any) -> Any:
    """Return the schema without room for unknown fields, which the API server would drop silently."""
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: _strict(part) for key, part in schema.items()}
    if (
        isinstance(pattern := strict.get("pattern"), str) and "(?i)" in pattern
    ):  # Go allows the flag anywhere, Python only first
        strict["pattern"] = "(?i)" + pattern.replace("(?i)", "")
    if strict.get("x-kubernetes-int-or-string"):
        strict.pop("type", None)
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        strict.setdefault("additionalProperties", False)
    return strict
