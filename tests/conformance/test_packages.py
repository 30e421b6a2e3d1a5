"""The page of public packages: a partial run keeps the remaining rows, and a measured row has its costs."""

from conformance.packages.__main__ import block
from conformance.packages.trial import Result

PAGE = """
| torchrl 0.1 | GRU of cells | random | refused: input: no \\| such | 7 |  |  |  |  |  |  |
| ncps 1.0 | CfC | random | streams | 9 | 40 | 80 | 0.50 | 0.0e+00 |  | 48 |
"""


def test_partial_run_keeps_the_remaining_rows() -> None:
    measured = Result("2.0", "streams", served_us=20.0, package_us=80.0, steps=2048)
    _, _, totals, _, _, _, *rows, _ = block({"ncps_cfc": measured}, PAGE)
    assert (
        totals
        == "2 modules of 2 packages: 1 refused, 1 streams. In 1 of 1, the served step costs at most the package's own."
    )
    assert rows == [PAGE.splitlines()[1], "| ncps 2.0 | CfC | random | streams | 0 | 20 | 80 | 0.25 |  |  | 2048 |"]
