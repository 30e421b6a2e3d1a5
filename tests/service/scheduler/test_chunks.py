"""The order of chunks, whole and in pieces; only a completed chunk changes its session."""

from fold import (
    LATER,
    FoldEngine,
    answer,
    failure,
    find,
    fold,
    inputs,
    names,
    run_until_idle,
    scheduler,
    submit,
    submit_sequence,
    turn,
)

from unroll.service.scheduler.reply import Reply


def test_steps_continue_from_the_state_of_the_session(s, engine):
    s.open("a", 0)
    first = submit(s, "a", inputs(1, 2), 0, LATER)
    second = submit(s, "a", inputs(3), 0, LATER)
    run_until_idle(s, engine)
    assert answer(first) + answer(second) == fold([1, 2, 3])
    assert repr(find(s, "a", 0)) == "<Session a idle position=3 expected=3>"


def test_batch_holds_many_sessions_but_each_only_once(s, engine):
    for name in "abc":
        s.open(name, 0)
        submit(s, name, inputs(1), 0, LATER)
        submit(s, name, inputs(2), 0, LATER)
    batches = run_until_idle(s, engine)
    assert [names(batch) for batch in batches] == [["a", "b", "c"], ["a", "b", "c"]]


def test_a_sequence_starts_from_the_initial_state_and_leaves_no_trace(s, engine):
    long = submit_sequence(s, inputs(*range(11)), 0, LATER)
    short = submit_sequence(s, inputs(5), 0, LATER)
    run_until_idle(s, engine)
    assert answer(long) == fold(range(11))
    assert answer(short) == fold([5])
    assert s.workspaces.taken == 0


def test_a_long_chunk_takes_turns_with_single_steps(s, engine):
    s.open("long", 0)
    s.open("live", 0)
    long = submit(s, "long", inputs(*range(12)), 0, LATER)
    turn(s, engine)
    live = submit(s, "live", inputs(1), 0, LATER)
    turn(s, engine)
    turn(s, engine)
    assert isinstance(live.outcome, Reply)
    assert long.outcome is None
    run_until_idle(s, engine)
    assert answer(long) == fold(range(12))


def test_a_long_chunk_does_not_touch_its_session_until_its_last_piece(s, engine):
    session = s.open("a", 0)
    submit(s, "a", inputs(1), 0, LATER)
    run_until_idle(s, engine)
    row = engine.rows[session.slot]
    long = submit(s, "a", inputs(*range(12)), 0, LATER)
    turn(s, engine)
    turn(s, engine)
    assert engine.rows[session.slot] == row
    s.cancel(long, 0)
    run_until_idle(s, engine)
    assert failure(long) == "cancelled"
    assert (engine.rows[session.slot], session.position, session.expected) == (row, 1, 1)


def test_rows_of_different_lengths_share_a_batch_only_if_the_model_is_ragged():
    s = scheduler(ragged=False)
    engine = FoldEngine(s.rows)
    for length in (2, 3, 2):
        submit_sequence(s, inputs(*range(length)), 0, LATER)
    assert [batch.lens for batch in run_until_idle(s, engine)] == [[2, 2], [3]]

    s = scheduler(ragged=True)
    for length in (3, 4, 3):
        submit_sequence(s, inputs(*range(length)), 0, LATER)
    assert [batch.lens for batch in run_until_idle(s, FoldEngine(s.rows))] == [[3, 4, 3]]
    assert s.counters.padded_steps == 2


def test_model_that_cannot_be_split_runs_whole_sequences():
    s = scheduler(cuttable=False)
    chunk = submit_sequence(s, inputs(*range(30)), 0, LATER)
    batches = run_until_idle(s, FoldEngine(s.rows))
    assert batches[0].lens == [30]
    assert answer(chunk) == fold(range(30))


def test_long_chunks_beyond_the_workspaces_wait_and_all_complete(s, engine):
    chunks = [submit_sequence(s, inputs(*range(i, i + 10)), 0, LATER) for i in range(10)]
    run_until_idle(s, engine)
    assert [answer(chunk) for chunk in chunks] == [fold(range(i, i + 10)) for i in range(10)]
    assert s.workspaces.taken == 0


def test_cancelling_starved_chunks_leaves_no_workspace_idle(s, engine):
    chunks = [submit_sequence(s, inputs(*range(10)), 0, LATER) for _ in range(8)]
    turn(s, engine)
    turn(s, engine)
    for chunk in chunks[3:7]:
        s.cancel(chunk, 0)
    run_until_idle(s, engine)
    assert answer(chunks[7]) == fold(range(10))


def test_late_starved_chunk_wakes_the_next(s):
    s = scheduler(max_batch=1)
    engine = FoldEngine(s.rows)
    chunks = [submit_sequence(s, inputs(*range(10)), 0, deadline) for deadline in (LATER, 5, LATER, LATER)]
    turn(s, engine, 0)
    turn(s, engine, 1)
    assert chunks[0].outcome is None
    run_until_idle(s, engine, 6)
    assert failure(chunks[1]) == "deadline_exceeded"
    assert [answer(chunk) for chunk in (chunks[0], *chunks[2:])] == [fold(range(10))] * 3
