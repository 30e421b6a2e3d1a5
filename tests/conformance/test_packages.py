"""The page of public packages: a partial run keeps the remaining rows."""

from conformance.packages.__main__ import block
from conformance.packages.trial import Result

PAGE = """
| torchrl 0.1 | GRU of cells | random | refused: input: no \\| such | 7 |  |  |  |  |
| ncps 1.0 | CfC | random | streams | 9 | 1.0 | 0.0e+00 |  | 48 |
"""


def test_partial_run_keeps_the_remaining_rows() -> None:
    _, _, totals, _, _, _, *rows, _ = block({"ncps_cfc": Result("2.0", "streams", steps=2048)}, PAGE)
    assert totals == "2 modules of 2 packages: 1 refused, 1 streams."
    assert rows == [PAGE.splitlines()[1], "| ncps 2.0 | CfC | random | streams | 0 |  |  |  | 2048 |"]
