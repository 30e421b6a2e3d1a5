"""The words that settings choose from. Imports nothing, so that a wrong setting is answered at once."""

from typing import Literal

#: What runs LSTM and GRU layers in single steps on a GPU.
Cells = Literal["fused", "onnxruntime"]
#: Of matrix products on a GPU.
Precision = Literal["float32", "tf32", "float16"]
#: When a store in a folder is synced to the disk.
Sync = Literal["always", "everysec", "never"]
#: Requests that leave a line in the log.
LogRequests = Literal["none", "errors", "all"]

#: Schemes of the URLs of Redis, with that of redis-py.
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
