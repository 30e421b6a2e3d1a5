"""A few of the random models of `make fuzz-export`, and its tools."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings

from conformance import children, fuzz
from conformance.children import Died
from conformance.fuzz import BAD, Store, Verdict, draw, judge, parse
from conformance.strategies import trees
from conformance.trees import Along, Both, Conv, Dense, Elementwise, Frames, Loop, Recurrent, Residual, Tree


@pytest.mark.long
@pytest.mark.timeout(240)
@settings(max_examples=1, derandomize=True, deadline=None, database=None)
@given(trees())
def test_random_models_are_never_silently_wrong(tree: Tree) -> None:
    verdict = judge(tree)
    assert verdict.outcome not in BAD, f"{verdict.says}\npython -m conformance fuzz --tree '{verdict.tree}'"


@pytest.mark.parametrize(
    ("tree", "outcome", "says"),
    [
        pytest.param(
            *(
                Tree("both", 3, (Residual((Recurrent("GRU", 3, 3, 2),), 3), Dense(3, 2)), "steps and last"),
                "streams",
                "",
            ),
            marks=pytest.mark.long,
        ),
        (Tree("floats", 2, (Recurrent("LSTM", 2, 3, axes="wrong"),), "steps"), "refused", "layer_axes"),
        pytest.param(
            *(Tree("floats", 2, (Along("flip", 2), Recurrent("RNN", 2, 3)), "steps"), "whole only", "later time steps"),
            marks=pytest.mark.long,
        ),
        (Tree("tokens", 2, (Recurrent("GRU", 2, 3),), "kept"), "streams", ""),
        pytest.param(
            *(
                Tree(
                    "floats",
                    3,
                    (Frames(3, 3), Loop("minimal", 3, 3, memory="debounce", holds="object")),
                    "steps",
                    mask="booleans",
                ),
                "streams",
                "",
            ),
            marks=pytest.mark.long,
        ),
        pytest.param(  # its last bits depend on the size of a call, but rarely
            *(
                Tree(
                    "floats",
                    5,
                    (
                        Both(Elementwise("clamp", 5), Conv(5, 5, 1, 1, True, "none")),
                        Elementwise("elu", 10),
                        Recurrent("GRU", 10, 5, 2),
                    ),
                    "steps",
                    layout="time first",
                    mask="left out",
                    seed=4,
                ),
                "streams",
                "",
            ),
            marks=pytest.mark.long,
        ),
        pytest.param(
            *(Tree("tokens", 2, (Recurrent("GRU", 2, 3), Recurrent("GRU", 3, 3)), "kept"), "refused", "keeps_state"),
            marks=pytest.mark.long,
        ),
        pytest.param(
            *(Tree("missing", 1, (Recurrent("GRU", 1, 1, 2),), "step", mask="booleans", seed=6), "streams", ""),
            marks=pytest.mark.long,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_judge_gives_the_expected_outcome(tree: Tree, outcome: str, says: str) -> None:
    verdict = judge(tree)
    assert verdict.outcome == outcome
    assert says in verdict.code or says in verdict.says


def test_tree_matches_its_description() -> None:
    blocks = (Conv(2, 4, 3), Elementwise("gate", 4), Loop("peephole", 4, 2), Recurrent("LSTM", 2, 3, start="learned"))
    tree = Tree("floats", 2, blocks, "dict", layout="time last", seed=3)
    assert parse(repr(tree)) == tree


def test_draws_are_the_same_each_time_and_all_different() -> None:
    some = list(draw(40))
    assert some == list(draw(40))
    assert len(set(some)) == 40
    assert list(draw(50))[:40] == some


def test_run_resumes_where_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, first = Store(tmp_path), next(draw(1))
    store.add(Verdict(repr(first), "streams"))
    with (tmp_path / "verdicts.jsonl").open("a") as file:
        file.write('{"tree": "Tree(sou')  # as if killed during a write
    asked: list[Tree] = []

    def run(work, jobs, **options):
        asked.extend(jobs)
        yield jobs[0], Died("crashed (-6)")
        yield from ((job, Verdict(repr(job), "refused", "parity")) for job in jobs[1:])

    monkeypatch.setattr(children, "run", run)
    verdicts = fuzz.run(4, tmp_path, workers=1)
    assert len(asked) == 3
    assert first not in asked
    assert [verdict.outcome for verdict in verdicts] == ["streams", "crashed", "refused", "refused"]
    assert len({verdict.tree for verdict in fuzz.Store(tmp_path).read()}) == 4
    lines = fuzz.counts(verdicts)
    assert "  1 streams" in lines[1]
    assert any("2 parity" in line for line in lines)
    assert any(line.split() == ["1", "crashed"] for line in lines)
    assert json.loads((tmp_path / "verdicts.jsonl").read_text().splitlines()[0])["outcome"] == "streams"
