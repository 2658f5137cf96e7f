"""The machine that lays out text as it arrives against the training layout; groups that the prompt fills; misuse."""

import numpy as np
import pytest

from cv2jax.config import UserError
from cv2jax.models.text_speech_lm import sequence
from cv2jax.synthesis import interleave

RATIOS = [(5, 15), (1, 1), (3, 7), (4, 2), None]


def cut(tokens, rng):
    """Random pieces, some of them empty."""
    borders = np.sort(rng.integers(0, len(tokens) + 1, rng.integers(0, 8)))
    return np.split(np.asarray(tokens, np.int32), borders)


def play(prompt_text, prompt_speech, pieces, speech, ratio, rng):
    """Runs the machine, "drawing" `speech`; returns the inputs (token, kind) and what was drawn behind each."""
    progress, inputs, drawn, left = (
        interleave.init(prompt_text.tolist(), prompt_speech.tolist(), ratio),
        [],
        [],
        speech.tolist(),
    )

    def run():
        nonlocal progress
        num = 0
        while True:
            progress, todo = interleave.step(progress, num)
            inputs.extend(zip(todo.tokens, todo.kinds, strict=True))
            num = min(todo.num_draws, int(rng.integers(1, 9)), len(left))
            if not todo.num_draws or (todo.in_tail and not left):
                return todo
            assert num, "a group asked for more speech than there is"
            for _ in range(num):
                drawn.append((len(inputs) - 1, left[0]))
                inputs.append((left.pop(0), sequence.SPEECH))

    for piece in pieces:
        progress = interleave.push_text(progress, piece.tolist())
        assert not run().in_tail
    progress = interleave.flush(progress)
    assert run().in_tail
    return inputs, drawn


@pytest.mark.parametrize("ratio", RATIOS)
def test_inputs_and_draws_are_those_of_the_training_layout(ratio):
    rng = np.random.default_rng(3)
    for _ in range(60):
        text, num_prompt_text = rng.integers(0, 512, rng.integers(1, 40)), int(rng.integers(0, 12))
        num_text = num_prompt_text + len(text)
        groups = num_text // ratio[0] * ratio[1] if ratio else 0
        speech = rng.integers(0, 61, groups + int(rng.integers(0, 20)))
        num_prompt = int(rng.integers(0, min(len(speech), 50) + 1))
        prompt_text = rng.integers(0, 512, num_prompt_text)
        row = sequence.build_row(
            np.concatenate([prompt_text, text]),
            speech,
            bistream=ratio is not None,
            text_vocabulary_size=512,
            num_speech_tokens=61,
            ratio=ratio or (5, 15),
        )
        for _ in range(3):
            arguments = prompt_text, speech[:num_prompt], cut(text, rng), speech[num_prompt:], ratio, rng
            inputs, drawn = play(*arguments)
            assert inputs == list(zip(row.token.tolist(), row.kind.tolist(), strict=True))
            at, tokens = (np.array([pair[i] for pair in drawn], int) for i in (0, 1))
            np.testing.assert_array_equal(row.targets[at], tokens)
            # Nothing is drawn where the layout has no target or a prompt; what is left are the fills and the one eos.
            others = np.setdiff1d(np.flatnonzero(row.targets != sequence.IGNORE), at)
            others = others[row.targets[others] >= 61]
            assert len(others) == (num_text // ratio[0] if ratio else 0) + 1


def test_a_group_filled_by_the_prompt_waits_for_text_and_has_no_double_group():
    progress = interleave.init(range(6), range(15))  # Q2: a whole group of prompt speech
    progress, todo = interleave.step(progress)
    assert todo.tokens == (sequence.SOS, *range(5), *range(15))
    assert (todo.num_draws, todo.in_tail) == (0, False)
    progress, todo = interleave.step(interleave.push_text(progress, [10, 11, 12]))
    assert (todo.tokens, todo.num_draws) == ((), 0)
    progress, todo = interleave.step(interleave.push_text(progress, [13, 14]))
    assert (todo.tokens, todo.num_draws) == ((5, 10, 11, 12, 13), 15)
    progress, todo = interleave.step(interleave.flush(progress), 4)
    assert (todo.tokens, todo.num_draws, todo.in_tail) == ((), 11, False)
    progress, todo = interleave.step(progress, 11)
    assert todo.tokens == (14, sequence.TASK)  # Q1: nothing is fed twice
    assert todo.in_tail


def test_prompt_speech_that_the_text_leaves_over_goes_behind_task():
    progress = interleave.flush(interleave.push_text(interleave.init([1], range(20)), [2, 3, 4, 5, 6]))  # Q3
    _, todo = interleave.step(progress)
    assert todo.tokens == (sequence.SOS, 1, 2, 3, 4, 5, *range(15), 6, sequence.TASK, *range(15, 20))
    assert todo.in_tail


def test_misuse_of_the_machine():
    with pytest.raises(ValueError, match="behind the flush"):
        interleave.push_text(interleave.flush(interleave.init()), [1])
    progress, todo = interleave.step(interleave.push_text(interleave.init(), range(5)))
    assert todo.num_draws == 15
    with pytest.raises(ValueError, match="16 tokens were drawn"):
        interleave.step(progress, 16)
    with pytest.raises(UserError, match="ratio 0:15"):
        interleave.init(ratio=(0, 15))
