"""The choices of settings. Imports nothing heavy, so that a wrong setting is reported immediately."""

from typing import Literal

#: Implementation of LSTM and GRU layers in single steps on a GPU.
Cells = Literal["fused", "onnxruntime"]
#: Precision of matrix products on a GPU.
Precision = Literal["float32", "tf32", "float16"]
#: When an embedded store is synced to the disk.
Sync = Literal["always", "everysec", "never"]
#: Which requests are logged.
LogRequests = Literal["none", "errors", "all"]

#: URL schemes of Redis, with the corresponding scheme of redis-py.
SCHEMES = {
    "redis": "redis",
    "rediss": "rediss",
    "unix": "unix",
    "valkey": "redis",
    "valkeys": "rediss",
    "redis+cluster": "redis",
    "rediss+cluster": "rediss",
    "redis+sentinel": "redis",
    "rediss+sentinel": "rediss",
}
