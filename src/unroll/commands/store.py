"""`unroll store check`."""

import json
from dataclasses import asdict, dataclass
from typing import Annotated

from unroll.commands.options import Json, argument, flag


def _folder(url: str) -> None:
    if not url.startswith("file:///"):
        raise ValueError("give a folder, such as file:///var/lib/unroll; Redis examines its own files")


@dataclass(frozen=True)
class Check:
    """Compare format and checksum of every entry of a store in a folder.

    Servers may use the store at the same time. The exit status is 0 if every entry is sound or was removed by --repair,
    1 if entries are damaged, and 2 if the store cannot be opened or its file as a whole is damaged.
    """

    store: Annotated[str, argument("URL", "the store, such as file:///var/lib/unroll", _folder)]
    repair: Annotated[bool, flag("--repair", "remove the damaged entries, and nothing else")] = False
    json: Json = False

    def run(self) -> int:
        from unroll.service.commands import store
        from unroll.service.settings import store_folder
        from unroll.service.store.embedded_check import check

        folder = store_folder(self.store)
        assert folder is not None
        report = check(folder, repair=self.repair)
        print(json.dumps(asdict(report), indent=2)) if self.json else print(*store.lines(report), sep="\n")
        return store.status(report)
