"""The processor-load forecaster on synthesised curves outside its training set."""

from unroll.models.load import CHECKPOINT
from unroll.models.stacked_rnn import StackedRNN
from unroll.models.training import load


def test_forecast_is_better_than_the_last_reading() -> None:
    error, naive = load.evaluate(StackedRNN.load(CHECKPOINT), curves=100)
    assert error < 0.75 * naive
