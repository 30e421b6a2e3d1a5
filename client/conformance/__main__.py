"""Test a client of Unroll servers with scripted conversations, and report the results.

COMMAND starts a program that drives the client. It reads commands and writes outcomes, one line of JSON each.
docs/client-conformance.md describes the contract and has examples.
"""

import argparse
import asyncio
import fnmatch
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from unroll.client.conformance.driver import Driver

try:
    from unroll.client.conformance.script import Conversation, ScriptError, read_conversations
except ModuleNotFoundError as missing:
    raise SystemExit(f"the package {missing.name} is not installed; pip install 'unroll-serve[conformance]'") from None

from unroll.client.conformance.play import Result, play
from unroll.client.conformance.scripted_server import ScriptedServer

FOLDER = Path(__file__).parent


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0 if no conversation failed, 1 if one did, 2 for invalid arguments."""
    options = _parser().parse_args(argv)
    try:
        conversations = read_conversations(options.conversations or sorted(FOLDER.glob("*.yaml")))
    except (ScriptError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    chosen = [each for each in conversations if fnmatch.fnmatchcase(each.name, options.only)]
    if not chosen:
        print(f"no conversation is called {options.only!r}; --list shows the names", file=sys.stderr)
        return 2
    if options.list:
        for each in chosen:
            print(f"{each.name}: {each.says}")
        return 0
    playing = run(options.client, chosen, limit=options.limit, jobs=options.jobs, tell=_print)
    results = asyncio.run(playing)
    counts = Counter(result.status for result in results)
    print(", ".join(f"{counts[status]} {status}" for status in ("passed", "failed", "unsupported")))
    if options.json is not None:
        options.json.write_text(json.dumps([vars(result) for result in results], indent=1) + "\n", encoding="utf-8")
    return 1 if counts["failed"] else 0


async def run(
    command: str, conversations: Sequence[Conversation], *, limit: float, jobs: int, tell: Callable[[Result], None]
) -> list[Result]:
    """Play conversations concurrently, since most of their time is spent waiting.

    Args:
        command: The command line of the program.
        conversations: The conversations to play.
        limit: Seconds allowed per command.
        jobs: The number of programs to run at a time, each with its own server.
        tell: Called with each result as soon as it is known.
    """
    waiting = iter(enumerate(conversations))
    results: dict[int, Result] = {}

    async def work() -> None:
        server, driver = ScriptedServer(), Driver(command, limit)
        await server.start()
        try:
            for index, conversation in waiting:
                results[index] = await play(conversation, server, driver)
                tell(results[index])
        finally:
            await driver.stop()
            await server.stop()

    async with asyncio.TaskGroup() as group:
        for _ in range(jobs):
            group.create_task(work())
    return [results[index] for index in sorted(results)]


def _print(result: Result) -> None:
    print(f"{result.status:<11} {result.name}", flush=True)
    if result.status == "failed":
        print(f"            {result.says}")
    for fault in result.faults:
        print(f"            - {fault}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m unroll.client.conformance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--client", metavar="COMMAND", help="command line of the program that drives the client")
    wanted.add_argument("--list", action="store_true", help="list the conversations without running them")
    parser.add_argument("--only", metavar="PATTERN", default="*", help="only these conversations, such as 'stream-*'")
    parser.add_argument(
        "--limit", metavar="SECONDS", type=float, default=60.0, help="time limit per command (default: 60)"
    )
    parser.add_argument("--jobs", metavar="N", type=int, default=2, help="concurrent programs (default: 2)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the results to this file")
    parser.add_argument(
        "conversations", metavar="FILE", nargs="*", type=Path, help="rest.yaml or stream.yaml (default: the built-in)"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
