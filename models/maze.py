"""A maze that requires memory: two signs at the entrance tell the turns at two distant junctions.

Needs only NumPy, so that the example runs without torch.
"""

from pathlib import Path
from typing import Literal

import numpy as np

CHECKPOINT = Path(__file__).parent / "checkpoints" / "policy"

#: The policy's actions, in the order of its outputs.
ACTIONS = ("forward", "left", "right")
FORWARD, LEFT, RIGHT = range(3)
#: The maximum length of a corridor.
LONGEST = 10


class Maze:
    """One episode: sign, sign, corridor, junction, corridor, junction. All corridors look alike.

    Attributes:
        outcome: None while the episode lasts; "lost" after the first wrong action.
    """

    def __init__(self, generator: np.random.Generator) -> None:
        signs = generator.integers(LEFT, RIGHT + 1, 2)
        corridors = [[FORWARD] * int(length) for length in generator.integers(1, LONGEST + 1, 2)]
        #: The correct action at each place, which serves as the hand-written controller.
        self.right_actions = [FORWARD, FORWARD, *corridors[0], int(signs[0]), *corridors[1], int(signs[1])]
        self._signs = [int(sign) for sign in signs]
        self._place = 0
        self.outcome: Literal["out", "lost"] | None = None

    def observe(self) -> np.ndarray:
        """The observation at this place, (3,) float32: a left sign, a right sign, a junction."""
        return self.observations()[self._place]

    def observations(self) -> np.ndarray:
        """The observations at all places on the way out, (places, 3) float32."""
        seen = np.zeros((len(self.right_actions), 3), np.float32)
        for place, sign in enumerate(self._signs):
            seen[place, sign - LEFT] = 1
        seen[np.array(self.right_actions) != FORWARD, 2] = 1
        return seen

    def act(self, action: int) -> None:
        """Perform an action, given as an index of ACTIONS."""
        if action != self.right_actions[self._place]:
            self.outcome = "lost"
            return
        self._place += 1
        if self._place == len(self.right_actions):
            self.outcome = "out"
