"""`python -m bench.peers`: creates the environments of the peers that need their own."""

from bench.environments import ensure
from bench.peers import PEERS

for peer in PEERS.values():
    if peer.environment:
        print(f"{peer.name}: {ensure(peer.name, peer.environment)}", flush=True)
