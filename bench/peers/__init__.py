"""Servers to compare with: how each is started, asked and read. The servers themselves are in `programs/`.

`canned`, `echo` and `noop` run no model; they start with `python -m bench.peers.<name> PORT`.
"""

from bench.peers.bentoml import BENTOML
from bench.peers.litserve import LITSERVE
from bench.peers.mlserver import MLSERVER
from bench.peers.peer import Peer
from bench.peers.plain import NAIVE, NAIVE_RAW
from bench.peers.triton import TRITON, TRITON_DIRECT

PEERS: dict[str, Peer] = {
    peer.name: peer for peer in (NAIVE, NAIVE_RAW, LITSERVE, BENTOML, MLSERVER, TRITON, TRITON_DIRECT)
}

__all__ = ["PEERS", "Peer"]
