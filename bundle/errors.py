"""Refusals of bundles: a code that never changes, the problem, and a remedy."""

#: Remedies by code. The text of a refusal is `CODE: problem; remedy`.
REMEDIES = {
    "bundle_file": "copy the bundle's files into its folder again",
    "bundle_too_large": "export the model again; export never writes a bundle that large",
    "bundle_name": "name the folder as the manifest does, or export the model again under another name",
    "bundle_manifest": "export the model again",
    "bundle_digest": "copy all files of one export into the folder, then send SIGHUP",
    "bundle_golden": "export the model again",
    "bundle_tolerance": "export the model again; --max-error limits the tolerance",
    "bundle_graph": "export the model again",
    "bundle_external_data": "export the model again; a bundle holds its weights in model.onnx",
    "bundle_operator": "if you trust the bundle, add the operator to --allow-operators",
    "bundle_unsigned": "sign it with `unroll export --sign`, or serve without --trusted-keys",
    "bundle_signature": "add the signer's public key to --trusted-keys if you trust it, or sign the bundle again",
    "bundle_mismatch": "export the model again, and run `unroll verify` on this machine",
    "bundle_memory": "if you trust the bundle, raise --bundle-memory",
    "bundle_time": "if you trust the bundle, raise --bundle-time",
    "bundle_crashed": "do not serve it; export the model again",
    "bundle_unusable": "run `unroll verify` and `unroll doctor` on this machine",
}


_LONGEST = 2000


class BundleError(Exception):
    """A bundle cannot be used.

    Attributes:
        code: A key of `REMEDIES`.
    """

    def __init__(self, code: str, message: str) -> None:
        message = printable(message)[:_LONGEST]
        super().__init__(f"{code}: {message}; {REMEDIES[code]}")
        self.code = code
        self.message = message


def printable(text: str) -> str:
    """Make untrusted text safe for logs and terminals: one line, without control characters."""
    return text if text.isprintable() else ascii(" ".join(text.split()))[1:-1]
