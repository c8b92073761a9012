"""What clients ask of the server, and how an answer grows: without a model that runs."""

import json

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import STORY

from recyc_jax.serve.asked import MOST_PROMPTS, Reader, RefusedError
from recyc_jax.serve.jobs import Answer, Delta, End, Job, Token
from recyc_jax.serve.kept_states import KeptStates

# --- a growing answer


class Letters:
    """A tokenizer whose tokens are letters."""

    def decode(self, ids, skip_special_tokens=False):
        return "".join("abc\x00"[id] for id in ids).replace("\x00", "")


@given(
    st.lists(st.integers(0, 3), max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.integers(1, 20),
    st.integers(1, 7),
)
def test_an_answer_ends_at_the_first_of_its_ends(ids, stops, most, size):
    events = []
    job = Job([0], most, stops=tuple(stops), emit=events.append)
    answer = Answer(job, Letters(), eos_ids=(3,))
    for begin in range(0, len(ids), size):
        answer.add([Token(id) for id in ids[begin : begin + size]])
    # the least number of tokens whose text has a stop string, and the other ends
    texts = [Letters().decode(ids[: count + 1]) for count in range(len(ids))]
    stopped = next((n + 1 for n, text in enumerate(texts) if any(stop in text for stop in stops)), None)
    ended = next((n + 1 for n, id in enumerate(ids) if id == 3), None)
    count = min(number for number in (stopped, ended, most, len(ids) + 1) if number is not None)
    said = "".join(event.text for event in events if isinstance(event, Delta))
    if count > len(ids):  # it goes on
        assert not job.ended.is_set()
        assert Letters().decode(ids).startswith(said)
        return
    whole = Letters().decode(ids[:count])
    cuts = [whole.find(stop) for stop in stops if stop in whole]
    assert said == whole[: min(cuts, default=len(whole))]
    assert events[-1] == End("stop" if count in (stopped, ended) else "length")
    assert job.made == count == len(answer.ids)


# --- kept states


class State:
    def __init__(self, size):
        self.logits = np.zeros((1, size // 4), np.float32)


jax.tree_util.register_pytree_node(State, lambda state: ((state.logits,), None), lambda _, leaves: leaves)


@pytest.mark.usefixtures("unchecked")
def test_the_longest_beginning_is_taken_and_the_oldest_goes():
    kept = KeptStates(300, goes_back=True)
    one, two, three = State(100), State(100), State(100)
    kept.keep(one, list(range(100)))
    kept.keep(two, [*range(80), *range(500, 520)])
    assert kept.shared([*range(90), 7]) == 90
    assert kept.take([*range(80), 500, 501, 7]) == (two, 82)
    assert kept.take([*range(80), 500, 501, 7]) == (one, 80)
    assert kept.take(list(range(100))) == (None, 0)
    kept.keep(one, list(range(100)))
    assert kept.shared(list(range(100))) == 99  # one token at least is read
    assert kept.shared(list(range(63))) == 0  # too few to be worth it
    for number, state in enumerate((two, three, State(100)), start=1):
        kept.keep(state, list(range(1000 * number, 1000 * number + 64)))
    assert (len(kept), kept.size) == (3, 300)
    assert kept.shared(list(range(100))) == 0
    kept.keep(State(400), list(range(100)))  # larger than all the room
    assert len(kept) == 3


@pytest.mark.usefixtures("unchecked")
def test_a_window_does_not_go_back():
    kept = KeptStates(300, goes_back=False)
    kept.keep(State(100), list(range(100)))
    assert kept.shared([*range(90), 7]) == 0
    assert kept.shared(list(range(101))) == 100


# --- what is asked


@pytest.fixture(scope="module")
def reader(served):
    return Reader(served.tokenizer, "tiny", served.config.vocab_size, 200, 50)


CHAT = {"messages": [{"role": "user", "content": "What is green?"}]}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (b"{", "the body is not JSON"),
        (b"[" * 100000, "the body is not JSON"),
        (b'{"temperature": NaN}', "NaN is no number of JSON"),
        ([], "the body must be a JSON object"),
        ({"model": "other"}, "the model 'other' is not here: this server has 'tiny'"),
        ({"n": 2}, "n is not supported by this server"),
        ({"n": True}, "n is not supported by this server"),
        ({"tools": [{}]}, "tools is not supported"),
        ({"messages": []}, "messages must be a list of at least one message"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\].content must be text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "this server reads no images"),
        ({"messages": [{"content": "x"}]}, r"messages\[0\] must be an object with a role"),
        ({"temperature": "hot"}, "temperature must be a number of 0 to 2, not 'hot'"),
        ({"temperature": True}, "temperature must be a number"),
        ({"top_p": 1.5}, "top_p must be a number of 0 to 1"),
        ({"max_tokens": 0}, "max_tokens must be a whole number of at least 1, not 0"),
        ({"max_tokens": 1.5}, "max_tokens must be a whole number"),
        ({"max_tokens": 190}, "exceed the 200 tokens that they may have together: at most"),
        ({"messages": [{"role": "user", "content": STORY * 3}]}, "the prompt has"),
        ({"stream": "yes"}, "stream must be true or false"),
        ({"stop": ["a"] * 17}, "stop must be a text or up to 16"),
        ({"stop": ""}, "stop must be a text"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs must be a whole number of 0 to 20"),
        ({"seed": 0.5}, "seed must be a whole number"),
        ({"presence_penalty": 3}, "presence_penalty must be a number of -2 to 2"),
        ({"stream_options": 3}, "stream_options must be an object"),
    ],
)
def test_a_request_that_is_refused_names_the_field(reader, fields, message):
    body = (
        fields
        if isinstance(fields, bytes)
        else json.dumps(CHAT | fields if isinstance(fields, dict) else fields).encode()
    )
    with pytest.raises(RefusedError, match=message):
        reader.chat(body)


@pytest.mark.parametrize("prompt", ["", [], [[]], [5, "x"], [400], [-1], 5, None, ["x"] * (MOST_PROMPTS + 1), [True]])
def test_a_prompt_that_is_none(reader, prompt):
    with pytest.raises(RefusedError):
        reader.completion(json.dumps({"prompt": prompt}).encode())


def test_what_is_asked_is_what_is_done(reader, served):
    asked = reader.chat(
        json.dumps(CHAT | {"temperature": 0, "stop": "x", "seed": -1, "max_completion_tokens": 7}).encode()
    )
    (job,) = asked.jobs
    assert served.tokenizer.decode(job.ids) == "[user] What is green?\n[assistant] "
    assert (job.max_tokens, job.temperature, job.stops, job.seed, job.top) == (7, 0, ("x",), 2**32 - 1, None)
    prompts = ["The grass", "Emma"]
    asked = reader.completion(json.dumps({"prompt": prompts, "logprobs": 2, "stream": True}).encode())
    assert [job.ids for job in asked.jobs] == [served.tokenizer(one)["input_ids"] for one in prompts]
    assert [(job.max_tokens, job.top) for job in asked.jobs] == [(16, 2)] * 2
    assert asked.is_streamed


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = (
    *("messages", "prompt", "model", "stream", "stop", "n", "max_tokens", "temperature", "top_p", "seed"),
    *("logprobs", "top_logprobs", "stream_options"),
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), json_values), st.booleans())
def test_whatever_is_asked_is_understood_or_refused(reader, fields, is_chat):
    ask = reader.chat if is_chat else reader.completion
    try:
        asked = ask(json.dumps(fields).encode())
    except RefusedError:
        return
    assert all(job.ids and job.max_tokens > 0 for job in asked.jobs)


def test_numbers_that_float32_lacks_are_the_most_likely_token(reader):
    """One client's odd numbers must not fail the batch that others are in."""
    for fields in ({"temperature": 1e-300}, {"temperature": 1e-40}, {"top_p": 1e-300}, {"top_p": 0}):
        (job,) = reader.completion(json.dumps({"prompt": "x", "seed": 1} | fields).encode()).jobs
        assert job.temperature == 0 or np.float32(job.temperature) >= np.float32(1e-4)
        assert np.float32(job.top_p) > 0


def test_half_a_character_is_refused(reader):
    with pytest.raises(RefusedError, match="the prompt cannot be read"):
        reader.completion(b'{"prompt": "\\ud800"}')
