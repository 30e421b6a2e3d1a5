"""One text of metrics from those of all workers."""

from serving import metrics

from unroll.service.api.worker_metrics import merge
from unroll.service.telemetry.metrics import Collector, RequestFigures, StoreFigures


def test_samples_of_all_workers_are_kept_apart_and_their_families_together() -> None:
    texts = {}
    for number in (1, 2):
        requests = {'a "route" { of } words': RequestFigures()}
        requests['a "route" { of } words'].observe(200, 0.5 * number)
        texts[number] = b"".join(Collector(list, requests, (), (), dict, StoreFigures()).exposition()).decode()
    merged = merge({**texts, 3: None})
    heads = [line for line in merged.splitlines() if line.startswith("# HELP")]
    assert len(heads) == len(set(heads)) > 5
    found = metrics(merged)
    for number, text in texts.items():
        worker = {("worker", str(number))}
        assert {(name, labels - worker): v for (name, labels), v in found.items() if worker <= labels} == {
            **metrics(text),
            ("unroll_worker_up", frozenset()): 1.0,
        }
    assert found["unroll_worker_up", frozenset({("worker", "3")})] == 0.0
