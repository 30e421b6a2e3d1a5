"""`python -m bench.peers`: creates the environments of the peers that need their own."""

import argparse

from bench.environments import ensure
from bench.peers import PEERS

OWN = {peer.name: peer.environment for peer in PEERS.values() if peer.environment}

parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
parser.add_argument("peers", nargs="*", metavar="PEER", help=f"of {', '.join(OWN)} (default: all)")
chosen = parser.parse_args().peers or list(OWN)
if unknown := [name for name in chosen if name not in OWN]:
    parser.error(f"no peer with an environment of its own is called {unknown[0]!r}; choose from {', '.join(OWN)}")
for name in chosen:
    print(f"{name}: {ensure(name, OWN[name])}", flush=True)
