"""The linked list of recency orders its entries as a plain list would."""

import hypothesis.strategies as st
from hypothesis import given, settings

from unroll.service.scheduler.recency import Recency, Used


class Named(Used):
    def __init__(self, name: str) -> None:
        self.name = name


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["add", "touch", "remove", "replace"]), st.integers(0, 99))))
def test_recency_orders_like_a_list(events: list[tuple[str, int]]) -> None:
    recency: Recency[Named] = Recency()
    order: list[Named] = []
    for n, (event, index) in enumerate(events):
        if event == "add" or not order:
            order.append(Named(f"{n}"))
            recency.add(order[-1])
            continue
        entry = order.pop(index % len(order))
        if event == "touch":
            recency.touch(entry)
            order.append(entry)
        elif event == "remove":
            recency.remove(entry)
        else:
            others = [Named(f"{n}.{i}") for i in range(index % 4)]
            recency.replace(entry, others)
            at = index % (len(order) + 1)
            order[at:at] = others
        assert [*recency] == order
        assert recency.oldest is (order[0] if order else None)
