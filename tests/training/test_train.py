import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra waterline-llm[training]")

from waterline.errors import InputError  # noqa: E402  # torch may be absent
from waterline.training import tokens  # noqa: E402  # as above
from waterline.training.network import Network, Shape  # noqa: E402  # as above
from waterline.training.problems import Problem, think  # noqa: E402  # as above
from waterline.training.train import (  # noqa: E402  # as above
    CHECKPOINT,
    IGNORED,
    loss_of,
    make_batch,
    rate_factor,
    read_checkpoint,
    share_solved,
    train,
    training_batch,
    training_sample,
)

TINY = Shape(channels=32, layers=1, heads=1, hidden_channels=32)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr("waterline.training.train.BATCH", 8)
    monkeypatch.setattr("waterline.training.train.EXAM_PROBLEMS", 4)


def pair(problem, *, thinking):
    return tokens.prompt("2*3", thinking=thinking), tokens.completion(problem, thinking=thinking)


def test_only_the_completion_is_predicted():
    batch = make_batch([pair(Problem(2, 3), thinking=False), pair(Problem(2, 3), thinking=True)])
    shorter, longer = batch.targets.tolist()
    assert [target for target in shorter if target != IGNORED] == [ord("6"), tokens.END]
    assert shorter.index(ord("6")) == len(tokens.prompt("2*3", thinking=False)) - 1
    assert [target for target in longer if target != IGNORED] == tokens.completion(Problem(2, 3), thinking=True)
    assert batch.tokens.shape == batch.targets.shape


def test_training_shows_thoughts_direct_answers_and_answers_to_thoughts_cut_short():
    dice = np.random.default_rng(0)
    problem = Problem(347, 586)
    thought = think(problem).encode()
    thinking, direct, cut = 0, 0, 0
    for _ in range(2000):
        prompt, completion = training_sample(problem, dice)
        if completion == tokens.completion(problem, thinking=True):
            thinking += 1
            continue
        assert completion == tokens.completion(problem, thinking=False)
        heard = bytes(prompt[prompt.index(tokens.THINK) + 1 : -1])
        assert prompt[-1] == tokens.THINK_END
        assert thought.startswith(heard)
        direct += heard == b""
        cut += heard != b""
    assert [thinking / 2000, direct / 2000, cut / 2000] == pytest.approx([0.75, 0.15, 0.10], abs=0.03)


def test_a_batch_depends_on_seed_and_step_alone():
    assert torch.equal(training_batch(1, 7).tokens, training_batch(1, 7).tokens)
    assert not torch.equal(training_batch(1, 7).tokens[:, :20], training_batch(1, 8).tokens[:, :20])
    assert not torch.equal(training_batch(1, 7).tokens[:, :20], training_batch(2, 7).tokens[:, :20])


def test_the_learning_rate_rises_stays_and_falls_to_nothing():
    assert rate_factor(0, 1000) == pytest.approx(0.02)
    assert rate_factor(200, 1000) == 1.0
    assert rate_factor(650, 1000) == pytest.approx(0.5)
    assert rate_factor(999, 1000) == pytest.approx(0.0, abs=0.002)


def test_a_few_steps_lower_the_loss(tmp_path, monkeypatch):
    monkeypatch.setattr("waterline.training.train.WARM_UP_STEPS", 1)
    torch.manual_seed(1)
    batch = training_batch(seed=9, step=0)
    before = loss_of(Network(TINY), batch).item()
    after = loss_of(train(tmp_path, TINY, steps=20, seed=1), batch).item()
    assert before == pytest.approx(5.56, abs=0.1)  # ln 261: every token equally likely
    assert after < before - 1.0


def test_a_run_that_was_stopped_and_continued_gives_the_same_weights(tmp_path, monkeypatch, capsys):
    unbroken = train(tmp_path / "unbroken", TINY, steps=6, seed=3).state_dict()
    monkeypatch.setattr("waterline.training.train.CHECKPOINT_STEPS", 2)
    monkeypatch.setattr("waterline.training.train.training_batch", stop_at(4))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "broken", TINY, steps=6, seed=3)
    monkeypatch.setattr("waterline.training.train.training_batch", training_batch)
    continued = train(tmp_path / "broken", TINY, steps=6, seed=3).state_dict()
    assert all(torch.equal(unbroken[name], continued[name]) for name in unbroken)
    assert "step 6/6  loss" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "broken").iterdir()] == [CHECKPOINT]


def stop_at(last_step):
    def batch_until(seed, step):
        if step == last_step:
            raise KeyboardInterrupt
        return training_batch(seed, step)

    return batch_until


def test_a_problem_is_solved_only_when_every_token_is_right():
    batch = make_batch([pair(Problem(2, 3), thinking=False)] * 2)

    def oracle(_):
        return torch.nn.functional.one_hot(batch.targets.clamp(min=0), tokens.VOCABULARY).float()

    def oracle_with_a_slip(_):
        scores = oracle(_)
        scores[1, -1] = 0.0
        scores[1, -1, ord("7")] = 1.0
        return scores

    assert share_solved(oracle, batch) == 1.0
    assert share_solved(oracle_with_a_slip, batch) == 0.5


def test_a_folder_without_a_checkpoint_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match=r"Train first: python -m waterline\.training train"):
        read_checkpoint(tmp_path, TINY)
