"""Kinds of modules as users write them, with the outcomes expected in tests: the rows of docs/conformance.md."""

from conformance.kinds.applications import APPLICATIONS
from conformance.kinds.habits import HABITS
from conformance.kinds.histories import DELAYS, HISTORIES
from conformance.kinds.kind import Kind
from conformance.kinds.late import LATE
from conformance.kinds.layers import LAYERS
from conformance.kinds.loops import LOOPS
from conformance.kinds.refused import REFUSED
from conformance.kinds.states import STATES
from conformance.kinds.whole_sequence import WHOLE_SEQUENCE

#: The kinds with an expected outcome.
TESTED = [*LAYERS, *LOOPS, *HABITS, *HISTORIES, *STATES, *DELAYS, *WHOLE_SEQUENCE, *REFUSED, *LATE]


def kinds() -> list[Kind]:
    """All kinds, in the order of the document."""
    return [*TESTED, *APPLICATIONS]
