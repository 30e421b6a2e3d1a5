"""A maze that needs memory: two signs at the entrance say how to turn at two junctions, far behind them.

Needs NumPy only, so that the example runs where there is no torch.
"""

from pathlib import Path
from typing import Literal

import numpy as np

CHECKPOINT = Path(__file__).parent / "checkpoints" / "policy"

#: What the policy chooses from, in the order of its outputs.
ACTIONS = ("forward", "left", "right")
FORWARD, LEFT, RIGHT = range(3)
#: Steps of a corridor, from one to this many.
LONGEST = 10


class Maze:
    """One episode. Sign, sign, corridor, junction, corridor, junction; all corridors look alike.

    Attributes:
        outcome: None while the episode lasts; "lost" after the first wrong action.
    """

    def __init__(self, generator: np.random.Generator) -> None:
        signs = generator.integers(LEFT, RIGHT + 1, 2)
        corridors = [[FORWARD] * int(length) for length in generator.integers(1, LONGEST + 1, 2)]
        #: The hand-written controller: what it does at each place.
        self.right_actions = [FORWARD, FORWARD, *corridors[0], int(signs[0]), *corridors[1], int(signs[1])]
        self._signs = [int(sign) for sign in signs]
        self._place = 0
        self.outcome: Literal["out", "lost"] | None = None

    def observe(self) -> np.ndarray:
        """What is seen here: (3,) float32, a sign to the left, a sign to the right, a junction."""
        return self.observations()[self._place]

    def observations(self) -> np.ndarray:
        """What is seen at each place on the way out: (places, 3) float32."""
        seen = np.zeros((len(self.right_actions), 3), np.float32)
        for place, sign in enumerate(self._signs):
            seen[place, sign - LEFT] = 1
        seen[np.array(self.right_actions) != FORWARD, 2] = 1
        return seen

    def act(self, action: int) -> None:
        """Do one of ACTIONS."""
        if action != self.right_actions[self._place]:
            self.outcome = "lost"
            return
        self._place += 1
        if self._place == len(self.right_actions):
            self.outcome = "out"
