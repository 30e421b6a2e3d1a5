"""Forks one `unroll serve` per request received on a socket, until the socket closes; see `preloaded.py`.

A request contains the arguments, the environment, the working directory, an optional script to run instead, and the
output file. The first reply is the process id; the second says that the process has been orphaned.
"""

import atexit
import importlib
import json
import os
import runpy
import socket
import sys
import traceback
from pathlib import Path

from unroll import cli
from unroll.service.core import failpoints

runpy.run_path(str(Path(__file__).parents[1] / "quick_servers.py"))["install"]()
for name in ("unroll.commands.serve", "unroll.commands.program", "unroll.service.serve"):
    importlib.import_module(name)  # modules the command imports late
link = socket.socket(fileno=int(sys.argv[1]))
while True:
    request, [*logs], _, _ = socket.recv_fds(link, 65_536, 1)
    if not request:
        break
    if (child := os.fork()) == 0:
        if pid := os.fork():
            link.send(str(pid).encode())
            os._exit(0)
        link.close()
        arguments, environment, folder, script = json.loads(request)
        os.chdir(folder)
        for descriptor in (1, 2):
            os.dup2(logs[0], descriptor)
        os.environ.clear()
        os.environ.update(environment)
        importlib.reload(failpoints)  # armed by the environment
        status: object = 1
        try:
            sys.argv[1:] = arguments
            program = ["-c", script] if script else ["-m", "unroll", "serve"]
            sys.orig_argv[1:] = [*program, *arguments]  # used to start workers
            status = exec(script, {"__name__": "__main__"}) if script else cli.main(["serve", *arguments])
        except SystemExit as ended:
            status = ended.code
        except Exception:  # noqa: BLE001 logged, as the interpreter does at exit
            traceback.print_exc()
        atexit._run_exitfuncs()
        os._exit(int(status or 0))  # a normal exit would wait for library threads that fork did not copy
    os.waitpid(child, 0)
    link.send(b"orphaned")
    os.close(logs[0])
