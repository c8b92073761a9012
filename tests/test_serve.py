"""The server: its parts, and a real process under OpenAI's own client."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import openai
import pytest
from checkpoints import write_folder
from conftest import environment
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import recyc_jax as rj
from recyc_jax.serve.asked import MOST_PROMPTS, Reader, RefusedError
from recyc_jax.serve.engine import Engine, FullError, Limits, StoppingError
from recyc_jax.serve.jobs import Answer, Delta, End, Failed, Job, Token
from recyc_jax.serve.kept_states import KeptStates

POLICY = "lookahead:budget=8,stride=4"
TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
STORY = (
    "It was a truth universally acknowledged, that Emma Woodhouse, handsome, clever, and rich, had lived 21 years. " * 4
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve") / "model"
    write_folder(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def lm(folder):
    return rj.load_pretrained(str(folder))


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


# --- the engine


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
def engine(lm):
    engine = Engine(lm, POLICY, Limits(max_batch=4, max_waiting=40))
    engine.start()
    yield engine
    engine.stop(30.0)


def generated(lm, ids, count, **options):
    out = rj.generate(lm.params, lm.config, [ids], policy=POLICY, max_new_tokens=count, **options)
    return out.tokens[0, : int(out.lengths[0])].tolist()


def test_every_client_gets_its_own_answer(lm, engine):
    rng = np.random.default_rng(0)
    jobs, wanted = [], []
    for number in range(24):
        ids = rng.integers(3, 400, int(rng.integers(1, 60))).tolist()
        count = int(rng.integers(1, 20))
        drawn = number % 3 == 0
        jobs.append(Job(ids, count, temperature=0.8 if drawn else 0.0, top_p=0.9 if drawn else 1.0, seed=number))
        sampling = rj.Sample(0.8, top_p=0.9) if drawn else rj.Greedy()
        wanted.append(generated(lm, ids, count, sampling=sampling, key=jax.random.key(number)[None]))
    found = answers_of(engine, jobs)
    assert [tokens for tokens, _, _ in found] == wanted
    for (tokens, text, end), job in zip(found, jobs, strict=True):
        assert end == End("stop" if tokens[-1] == 0 else "length")
        assert text == lm.tokenizer.decode(tokens, skip_special_tokens=True)
        assert job.made == len(tokens)


def test_a_conversation_is_read_once(lm, engine):
    ids = lm.tokenizer(STORY)["input_ids"]
    first = Job(ids, 12, temperature=0.0)
    (tokens, _, _), *_ = answers_of(engine, [first])
    second = Job([*ids, *tokens, *lm.tokenizer("What is the number?")["input_ids"]], 12, temperature=0.0)
    ((again, _, _),) = answers_of(engine, [second])
    assert (first.cached, second.cached) == (0, len(ids) + len(tokens) - 1)
    assert again == generated(lm, second.ids, 12)
    third = Job([*ids, *lm.tokenizer("Who is Emma?")["input_ids"]], 12, temperature=0.0)  # another question
    ((other, _, _),) = answers_of(engine, [third])
    assert third.cached == len(ids)
    assert other == generated(lm, third.ids, 12)


def test_rows_of_a_batch_are_kept_too(lm, engine):
    stories = [lm.tokenizer(name + STORY)["input_ids"] for name in ("Emma: ", "Anne: ", "Mary: ")]
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
        assert tokens == generated(lm, job.ids, 8)


def test_scores_come_with_tokens(lm, engine):
    ids = lm.tokenizer("The grass is")["input_ids"]
    (job,) = jobs = [Job(ids, 6, temperature=0.0, top=3)]
    deltas = []
    job.emit = deltas.append
    engine.submit(jobs)
    assert job.ended.wait(60)
    tokens = [token for delta in deltas if isinstance(delta, Delta) for token in delta.tokens]
    out = rj.generate(lm.params, lm.config, [ids], policy=POLICY, max_new_tokens=6, top_log_probabilities=3)
    np.testing.assert_allclose([t.log_probability for t in tokens], out.log_probabilities[0, : len(tokens)], atol=1e-4)
    assert [[best for best, _ in token.top] for token in tokens] == out.top_tokens[0, : len(tokens)].tolist()


def test_a_failure_is_said_and_the_next_is_answered(lm, engine, monkeypatch):
    from recyc_jax.serve import engine as module

    real = module.prefill

    def broken(*args, **options):
        monkeypatch.setattr(module, "prefill", real)
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(module, "prefill", broken)
    first, second = Job([5, 6, 7], 4, temperature=0.0), Job([5, 6, 7] * 40, 4, temperature=0.0)
    (one, two) = answers_of(engine, [first, second])
    assert one[2] == Failed("the model failed: RESOURCE_EXHAUSTED: out of memory")
    assert two[0] == generated(lm, second.ids, 4)


def test_who_leaves_frees_the_place(lm, engine):
    long, short = Job([5, 6, 7], 3000, temperature=1.0, seed=1), Job([9], 3, temperature=0.0)
    engine.submit([long])
    time.sleep(0.3)
    long.cancel()
    assert len(answers_of(engine, [short])) == 1
    assert long.made < 3000


def test_the_queue_has_an_end(lm):
    engine = Engine(lm, POLICY, Limits(max_waiting=3))  # which does not run
    engine.submit([Job([5], 1), Job([5], 1)])
    with pytest.raises(FullError, match="2 requests wait already, and at most 3 may"):
        engine.submit([Job([5], 1), Job([5], 1)])
    engine.submit([Job([5], 1)])
    assert engine.waiting == 3


def test_stopping_answers_who_is_there(lm):
    engine = Engine(lm, POLICY, Limits(max_batch=1))
    engine.start()
    jobs = [Job([5, number], 40, temperature=0.0) for number in range(3, 6)]
    engine.submit(jobs)
    engine.stop(60.0)
    assert [job.ended.is_set() and job.made > 0 for job in jobs] == [True] * 3
    with pytest.raises(StoppingError):
        engine.submit([Job([5], 1)])


# --- what is asked


@pytest.fixture(scope="module")
def reader(lm):
    return Reader(lm.tokenizer, "tiny", lm.config.vocab_size, 200, 50)


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


def test_what_is_asked_is_what_is_done(reader, lm):
    asked = reader.chat(
        json.dumps(CHAT | {"temperature": 0, "stop": "x", "seed": -1, "max_completion_tokens": 7}).encode()
    )
    (job,) = asked.jobs
    assert lm.tokenizer.decode(job.ids) == "[user] What is green?\n[assistant] "
    assert (job.max_tokens, job.temperature, job.stops, job.seed, job.top) == (7, 0, ("x",), 2**32 - 1, None)
    prompts = ["The grass", "Emma"]
    asked = reader.completion(json.dumps({"prompt": prompts, "logprobs": 2, "stream": True}).encode())
    assert [job.ids for job in asked.jobs] == [lm.tokenizer(one)["input_ids"] for one in prompts]
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


# --- a real server


class Server:
    """A process that serves, and its address."""

    def __init__(self, folder, *flags, key=None):
        env = environment() | {"RECYC_JAX_API_KEY": key or "", "PYTHONUNBUFFERED": "1"}
        command = [
            sys.executable,
            "-m",
            "recyc_jax.serve",
            "--model",
            str(folder),
            "--name",
            "tiny",
            "--policy",
            POLICY,
        ]
        self.process = subprocess.Popen(
            [*command, "--port", "0", *flags], env=env, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        self.lines, self.port = [], None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"http://127\.0\.0\.1:(\d+)/v1", line):
                self.port = int(found[1])
                break
        assert self.port is not None, "".join(self.lines)
        threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True).start()
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key or "none", max_retries=0)

    def ask(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, response.read().decode()

    def figure(self, name):
        _, text = self.ask("GET", "/metrics")
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    def end(self, number=signal.SIGTERM, timeout=60):
        self.process.send_signal(number)
        return self.process.wait(timeout)


@pytest.fixture(scope="module")
def server(folder):
    server = Server(folder)
    yield server
    assert server.end() == 0
    assert "Traceback" not in "".join(server.lines), "".join(server.lines)


MESSAGES = [{"role": "user", "content": "What is green?"}]


def test_openais_client(server, lm):
    chat = server.client.chat.completions.create
    assert [model.id for model in server.client.models.list()] == ["tiny"]
    assert server.client.models.retrieve("tiny").owned_by == "recyc_jax"
    options = dict(model="tiny", messages=MESSAGES, temperature=0, max_tokens=20)
    ids = lm.tokenizer("[user] What is green?\n[assistant] ")["input_ids"]
    tokens = generated(lm, ids, 20)
    text = lm.tokenizer.decode(tokens, skip_special_tokens=True)
    reply = chat(**options)
    assert reply.choices[0].message.content == text
    assert reply.choices[0].finish_reason == ("stop" if tokens[-1] == 0 else "length")
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(ids), len(tokens))
    chunks = list(chat(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage.completion_tokens == len(tokens)
    scored = chat(**options, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert len(scored) == len(tokens)
    assert all(one.logprob == one.top_logprobs[0].logprob for one in scored)
    both = server.client.completions.create(
        model="tiny", prompt=[ids[:5], ids], temperature=0, max_tokens=20, logprobs=1
    )
    assert both.choices[1].text == text
    assert both.choices[1].logprobs.text_offset[:2] == [0, len(both.choices[1].logprobs.tokens[0])]
    drawn = [
        chat(model="tiny", messages=MESSAGES, max_tokens=20, seed=seed).choices[0].message.content for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_is_refused_is_refused_as_openai_does(server):
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        server.client.chat.completions.create(model="gpt", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="n is not supported"):
        server.client.chat.completions.create(model="tiny", messages=MESSAGES, n=2)
    assert server.ask("POST", "/v1/completions", "{", content_type="application/json")[0] == 400
    assert server.ask("POST", "/v1/completions", "{}", content_type="text/plain")[0] == 415
    large = b" " * (9 * 2**20)
    assert server.ask("POST", "/v1/completions", large, content_type="application/json")[0] == 413
    status, text = server.ask("GET", "/v1/chat")
    assert (status, "there is /v1/chat/completions" in text) == (404, True)
    assert server.ask("GET", "/v1/completions")[0] == 405
    assert server.ask("GET", "/health")[0] == 200
    assert server.figure('recyc_jax_requests_total{path="/v1/completions",status="413"}') == 1


def test_clients_that_leave_are_forgotten(server):
    """One leaves in the middle of an answer, one before it, one in the middle of a request."""
    whole = json.dumps({"prompt": "Emma", "max_tokens": 3000, "temperature": 2, "stream": True, "seed": 3})
    for body, length, read in ((whole, len(whole), True), (whole, len(whole), False), (whole[:20], len(whole), False)):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            head = (
                "POST /v1/completions HTTP/1.1",
                "Host: x",
                "Content-Type: application/json",
                f"Content-Length: {length}",
            )
            connection.sendall("\r\n".join([*head, "", body]).encode())
            if read:
                assert connection.recv(100).startswith(b"HTTP/1.1 200")
    deadline = time.monotonic() + 20
    while server.figure("recyc_jax_running_requests") or server.figure("recyc_jax_waiting_requests"):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_many_clients_at_once(server, lm):
    """32 clients of ragged lengths, some of whom leave, read slowly or send no JSON; each gets the answer to its own
    prompt."""
    rng = np.random.default_rng(1)
    jobs = [(rng.integers(3, 400, int(rng.integers(1, 50))).tolist(), int(rng.integers(1, 40))) for _ in range(32)]

    def client(number):
        ids, count = jobs[number]
        if number % 8 == 0:
            assert server.ask("POST", "/v1/completions", "{]", content_type="application/json")[0] == 400
        options = dict(model="tiny", prompt=ids, max_tokens=count, temperature=0)
        if number % 4 == 1:
            stream = server.client.completions.create(**options, stream=True)
            text = ""
            for chunk in stream:
                text += chunk.choices[0].text
                time.sleep(0.05)
                if number % 8 == 5:
                    stream.close()
                    return None
            return text
        return server.client.completions.create(**options).choices[0].text

    with ThreadPoolExecutor(32) as pool:
        texts = list(pool.map(client, range(32)))
    for (ids, count), text in zip(jobs, texts, strict=True):
        if text is not None:
            assert text == lm.tokenizer.decode(generated(lm, ids, count), skip_special_tokens=True)


def test_a_signal_lets_answers_end(folder):
    server = Server(folder)
    stream = server.client.completions.create(
        model="tiny",
        prompt="Emma",
        max_tokens=1500,
        temperature=2,
        seed=3,
        stream=True,
        stream_options={"include_usage": True},
    )
    next(iter(stream))
    server.process.send_signal(signal.SIGTERM)
    *_, last = stream
    assert last.usage.completion_tokens > 1
    assert server.process.wait(60) == 0
    assert server.lines[-1] == "stopped\n"
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", server.port))


def test_a_key_a_queue_and_a_time_limit(folder):
    server = Server(folder, "--max-waiting", "1", "--max-batch", "1", "--time-limit", "3", key="secret")
    other = openai.OpenAI(base_url=server.client.base_url, api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
        other.models.list()
    assert server.ask("GET", "/metrics")[0] == 401
    assert server.ask("GET", "/health")[0] == 200
    options = dict(model="tiny", prompt="Emma", max_tokens=4000, temperature=2, seed=3)

    def status(_):
        try:
            server.client.completions.create(**options)
        except openai.APIStatusError as error:
            return error.status_code
        return 200

    with ThreadPoolExecutor(6) as pool:
        found = sorted(pool.map(status, range(6)))
    assert found.count(429) >= 4
    assert set(found) <= {200, 429, 504}
    assert server.end() == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-length", "5000"], "--max-length 5000 must lie in 2..4096"),
        (["--policy", "recycled:budget=x"], "budget"),
        (["--max-batch", "0"], "--max-batch 0 must be at least 1"),
        (["--port", "70000"], "--port 70000 must lie in 0..65535"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1 --port 8000"),
        (["--kept-gib", "-1"], "--kept-gib -1.0 must be at least 0"),
    ],
)
def test_flags_that_are_wrong(folder, flags, message, capsys):
    from recyc_jax.serve.__main__ import main

    assert main(["--model", str(folder), *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken(folder, capsys):
    from recyc_jax.serve.__main__ import main

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--model", str(folder), "--port", str(port)]) == 2
    assert "another server may listen there: pass --port" in capsys.readouterr().err
    assert os.environ.get("RECYC_JAX_API_KEY") is None
