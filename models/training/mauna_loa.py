"""Rewrite `examples/co2/co2.csv` from the measurements that statsmodels ships.

python -m unroll.models.training.mauna_loa
"""

from statsmodels.datasets import co2

from unroll.models.mauna_loa import PATH

HEADER = """\
# Weekly atmospheric CO2 at Mauna Loa Observatory, Hawaii, in parts per million (ppm), from flask samples.
# Keeling, C.D. and T.P. Whorf (2004), Scripps Institution of Oceanography; in Trends: A Compendium of Data on
# Global Change, Carbon Dioxide Information Analysis Center, Oak Ridge National Laboratory. Public domain.
# Taken from statsmodels.datasets.co2. Weeks without a measurement lie on the line between their neighbours and
# carry interpolated = 1. Written by `python -m unroll.models.training.mauna_loa`.
"""


def csv_text() -> str:
    measured = co2.load_pandas().data["co2"]
    lines = [
        f"{day:%Y-%m-%d},{ppm:.3f},{int(missing)}"
        for day, ppm, missing in zip(measured.index, measured.interpolate(), measured.isna(), strict=True)
    ]
    return HEADER + "\n".join(["date,ppm,interpolated", *lines]) + "\n"


if __name__ == "__main__":
    PATH.write_text(csv_text())
    print(PATH)
