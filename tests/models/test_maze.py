"""The maze, and the policy in mazes outside its training set."""

import numpy as np

from unroll.models.maze import CHECKPOINT, FORWARD, Maze
from unroll.models.stacked_rnn import StackedRNN
from unroll.models.training import policy


def test_the_controller_gets_out_and_one_wrong_turn_is_the_end() -> None:
    for seed in range(10):
        maze = Maze(np.random.default_rng(seed))
        for action in maze.right_actions[:-1]:
            maze.act(action)
            assert maze.outcome is None
        maze.act(FORWARD)  # at a junction
        assert maze.outcome == "lost"
        maze = Maze(np.random.default_rng(seed))
        for action in maze.right_actions:
            maze.act(action)
        assert maze.outcome == "out"


def test_the_policy_needs_its_memory() -> None:
    remembering, forgetful = policy.evaluate(StackedRNN.load(CHECKPOINT), mazes=200)
    assert remembering > 0.99
    assert forgetful < 0.4
