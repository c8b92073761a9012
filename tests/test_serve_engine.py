"""The server's engine: batches of jobs, and states that are gone on from."""

import time

import jax
import numpy as np
import pytest
from checkpoints import write_folder
from serving import POLICY, STORY, generated

import recyc_jax as rj
from recyc_jax.serve.engine import Engine, FullError, Limits, StoppingError
from recyc_jax.serve.jobs import Delta, End, Failed, Job


def answers_of(engine, jobs, timeout=120):
    """The tokens, text and last event of each job."""
    events = {id(job): [] for job in jobs}
    for job in jobs:
        job.emit = events[id(job)].append
    engine.submit(jobs)
    for job in jobs:
        assert job.ended.wait(timeout)
    time.sleep(0.05)  # the last event follows the flag
    found = []
    for job in jobs:
        *deltas, end = events[id(job)]
        found.append(([token.id for delta in deltas for token in delta.tokens], "".join(d.text for d in deltas), end))
    return found


@pytest.fixture
def engine(served):
    engine = Engine(served, POLICY, Limits(max_batch=4, max_waiting=40))
    engine.start()
    yield engine
    engine.stop(30.0)


def test_every_client_gets_its_own_answer(served, engine):
    rng = np.random.default_rng(0)
    jobs, wanted = [], []
    for number in range(24):
        ids = rng.integers(3, 400, int(rng.integers(1, 60))).tolist()
        count = int(rng.integers(1, 20))
        drawn = number % 3 == 0
        jobs.append(Job(ids, count, temperature=0.8 if drawn else 0.0, top_p=0.9 if drawn else 1.0, seed=number))
        sampling = rj.Sample(0.8, top_p=0.9) if drawn else rj.Greedy()
        wanted.append(generated(served, ids, count, sampling=sampling, key=jax.random.key(number)[None]))
    found = answers_of(engine, jobs)
    assert [tokens for tokens, _, _ in found] == wanted
    for (tokens, text, end), job in zip(found, jobs, strict=True):
        assert end == End("stop" if tokens[-1] == 0 else "length")
        assert text == served.tokenizer.decode(tokens, skip_special_tokens=True)
        assert job.made == len(tokens)


def test_a_conversation_is_read_once(served, engine):
    ids = served.tokenizer(STORY)["input_ids"]
    first = Job(ids, 12, temperature=0.0)
    (tokens, _, _), *_ = answers_of(engine, [first])
    second = Job([*ids, *tokens, *served.tokenizer("What is the number?")["input_ids"]], 12, temperature=0.0)
    ((again, _, _),) = answers_of(engine, [second])
    assert (first.cached, second.cached) == (0, len(ids) + len(tokens))
    assert again == generated(served, second.ids, 12)
    third = Job([*ids, *served.tokenizer("Who is Emma?")["input_ids"]], 12, temperature=0.0)  # another question
    ((other, _, _),) = answers_of(engine, [third])
    assert third.cached == len(ids)
    assert other == generated(served, third.ids, 12)


def test_rows_of_a_batch_are_kept_too(served, engine):
    stories = [served.tokenizer(name + STORY)["input_ids"] for name in ("Emma: ", "Anne: ", "Mary: ")]
    jobs = [Job(ids, 8, temperature=0.0) for ids in stories]
    answers = answers_of(engine, jobs)
    deadline = time.monotonic() + 10
    while len(engine.kept) < 3 and time.monotonic() < deadline:  # after the answers' last words
        time.sleep(0.05)
    assert len(engine.kept) == 3
    again = [
        Job([*ids, *tokens, 5, 6, 7], 8, temperature=0.0) for ids, (tokens, _, _) in zip(stories, answers, strict=True)
    ]
    found = answers_of(engine, again)
    for job, (tokens, _, _) in zip(again, found, strict=True):
        assert job.cached > len(stories[0]) - 4
        assert tokens == generated(served, job.ids, 8)


def test_scores_come_with_tokens(served, engine):
    ids = served.tokenizer("The grass is")["input_ids"]
    (job,) = jobs = [Job(ids, 6, temperature=0.0, top=3)]
    deltas = []
    job.emit = deltas.append
    engine.submit(jobs)
    assert job.ended.wait(60)
    tokens = [token for delta in deltas if isinstance(delta, Delta) for token in delta.tokens]
    out = rj.generate(served.params, served.config, [ids], policy=POLICY, max_new_tokens=6, top_log_probabilities=3)
    np.testing.assert_allclose([t.log_probability for t in tokens], out.log_probabilities[0, : len(tokens)], atol=1e-4)
    assert [[best for best, _ in token.top] for token in tokens] == out.top_tokens[0, : len(tokens)].tolist()


def test_a_failure_is_said_and_the_next_is_answered(served, engine, monkeypatch):
    from recyc_jax.serve import engine as module

    real = module.prefill

    def broken(*args, **options):
        monkeypatch.setattr(module, "prefill", real)
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(module, "prefill", broken)
    first, second = Job([5, 6, 7], 4, temperature=0.0), Job([5, 6, 7] * 40, 4, temperature=0.0)
    (one, two) = answers_of(engine, [first, second])
    assert one[2] == Failed("the model failed: RESOURCE_EXHAUSTED: out of memory")
    assert two[0] == generated(served, second.ids, 4)


def test_who_leaves_frees_the_place(served, engine):
    long, short = Job([5, 6, 7], 3000, temperature=1.0, seed=1), Job([9], 3, temperature=0.0)
    engine.submit([long])
    time.sleep(0.3)
    long.cancel()
    assert len(answers_of(engine, [short])) == 1
    assert long.made < 3000


def test_the_queue_has_an_end(served):
    engine = Engine(served, POLICY, Limits(max_waiting=3))  # which does not run
    engine.submit([Job([5], 1), Job([5], 1)])
    with pytest.raises(FullError, match="2 requests wait already, and at most 3 may"):
        engine.submit([Job([5], 1), Job([5], 1)])
    engine.submit([Job([5], 1)])
    assert engine.waiting == 3


def test_stopping_answers_who_is_there(served):
    engine = Engine(served, POLICY, Limits(max_batch=1))
    engine.start()
    jobs = [Job([5, number], 40, temperature=0.0) for number in range(3, 6)]
    engine.submit(jobs)
    engine.stop(60.0)
    assert [job.ended.is_set() and job.made > 0 for job in jobs] == [True] * 3
    with pytest.raises(StoppingError):
        engine.submit([Job([5], 1)])


def test_a_model_with_windows_goes_on(tmp_path):
    """Its state cannot drop tokens: an answer that ended by its number of tokens has one that is not fed yet."""
    write_folder(tmp_path / "model", family="gemma3_text")
    served = rj.load_pretrained(str(tmp_path / "model"))
    engine = Engine(served, POLICY, Limits())
    engine.start()
    ids = served.tokenizer(STORY)["input_ids"]
    (tokens, _, end), *_ = answers_of(engine, [Job(ids, 8, temperature=0.0)])
    again = Job([*ids, *tokens, 5, 6, 7], 8, temperature=0.0)
    ((more, _, _),) = answers_of(engine, [again])
    engine.stop(30.0)
    assert end == End("length")
    assert again.cached in (0, len(ids) + len(tokens))  # none where the state stands behind the answer's end
    assert more == generated(served, again.ids, 8)


def test_a_message_that_all_share_keeps_nobody_apart(served):
    """Requests that begin alike, and go on differently for longer, are answered together."""
    engine = Engine(served, POLICY, Limits())  # which does not run
    shared = list(range(3, 103))
    engine.kept.keep(
        rj.prefill(served.params, served.config, [[*shared, *range(110, 300)]]), [*shared, *range(110, 300)]
    )
    jobs = [Job([*shared, *range(number, number + 120)], 4) for number in (10, 20, 30)]
    engine.submit(jobs)
    assert engine._next() == jobs
    assert engine.kept.shared([*shared, *range(110, 290), 5]) == 280
