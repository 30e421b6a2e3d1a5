"""How answers are sent."""

from fake_link import Wire
from streams import replies
from waiting import reached


async def test_errors_release_the_window(wire: Wire):
    await wire.bind(2)
    wire.frame(range(2, 10))
    assert [message["handle"] for message in wire.sent if isinstance(message, dict)] == list(range(2, 10))
    assert "0 entries" in repr(wire.connection)


async def test_a_frame_is_answered_in_few_frames(wire: Wire):
    """One frame answers the idle sessions; another answers the busy ones, which were queued one by one."""
    await wire.bind(100, depth=2)
    wire.frame(range(50))
    wire.frame(range(100))
    wire.engine.release()
    await reached(lambda: len(wire.answered()) == 150)
    assert len(wire.sent) <= 4
    frames = [replies(wire.manifest, message) for message in wire.sent if isinstance(message, bytes)]
    assert {reply.position for reply in frames[0]} == {1}
