"""A server, as a process of its own, under OpenAI's client."""

import json
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
from serving import Server, generated


@pytest.fixture(scope="module")
def server(served_folder):
    server = Server(served_folder)
    yield server
    assert server.end() == 0
    assert "Traceback" not in "".join(server.lines), "".join(server.lines)


MESSAGES = [{"role": "user", "content": "What is green?"}]


def test_openais_client(server, served):
    chat = server.client.chat.completions.create
    assert [model.id for model in server.client.models.list()] == ["tiny"]
    assert server.client.models.retrieve("tiny").owned_by == "recyc_jax"
    options = dict(model="tiny", messages=MESSAGES, temperature=0, max_tokens=20)
    ids = served.tokenizer("[user] What is green?\n[assistant] ")["input_ids"]
    tokens = generated(served, ids, 20)
    text = served.tokenizer.decode(tokens, skip_special_tokens=True)
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
    stream = server.client.completions.create(
        model="tiny", prompt=ids, temperature=0, max_tokens=20, logprobs=1, stream=True
    )
    offsets = [at for chunk in stream if (scores := chunk.choices[0].logprobs) for at in scores.text_offset]
    assert offsets == both.choices[1].logprobs.text_offset
    drawn = [
        chat(model="tiny", messages=MESSAGES, max_tokens=20, seed=seed).choices[0].message.content for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_is_refused_is_refused_as_openai_does(server):
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        server.client.chat.completions.create(model="gpt", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="n is not supported"):
        server.client.chat.completions.create(model="tiny", messages=MESSAGES, n=2)
    for field, value, nothing in (
        ("top_k", 5, -1),
        ("repetition_penalty", 1.2, 1.0),
        ("ignore_eos", True, False),
        ("guided_json", {}, None),
        ("anything", 1, None),
    ):
        asked = {"prompt": "Emma", "max_tokens": 1}
        for given, status in ((value, 400), (nothing, 200)):
            body = json.dumps(asked | {field: given, "user": "me"})
            answered, text = server.ask("POST", "/v1/completions", body, content_type="application/json")
            assert answered == status, (field, given, text)
            assert status == 200 or f"{field} is not supported" in text
    called = [{"role": "user", "content": "hi", "tool_calls": [{"id": "a"}]}]
    with pytest.raises(openai.BadRequestError, match=r"messages\[0\]\.tool_calls is not supported"):
        server.client.chat.completions.create(model="tiny", messages=called)
    assert server.ask("POST", "/v1/completions", "{", content_type="application/json")[0] == 400
    assert server.ask("POST", "/v1/completions", "{}", content_type="text/plain")[0] == 415
    large = b" " * (9 * 2**20)
    assert server.ask("POST", "/v1/completions", large, content_type="application/json")[0] == 413
    status, text = server.ask("GET", "/v1/chat")
    assert (status, "there is /v1/chat/completions" in text) == (404, True)
    assert server.ask("GET", "/v1/completions")[0] == 405
    assert server.ask("GET", "/health")[0] == 200
    assert server.ask("GET", "/v1/models", host="evil.example")[0] == 403  # another's page, whose name leads here
    assert server.ask("GET", "/v1/models", host=f"localhost:{server.port}")[0] == 200
    assert server.ask("POST", "/v1/completions", '{"prompt": "\\ud800"}', content_type="application/json")[0] == 400
    assert server.figure('recyc_jax_requests_total{path="/v1/completions",status="413"}') == 1


def test_variables_of_the_template(server):
    """Those of the model's own; not the arguments by which a template is applied."""
    options = dict(model="tiny", messages=MESSAGES, max_tokens=1)
    server.client.chat.completions.create(**options, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    for taken in ("chat_template", "tokenize", "messages"):
        with pytest.raises(openai.BadRequestError, match="template's own variables"):
            server.client.chat.completions.create(**options, extra_body={"chat_template_kwargs": {taken: "x"}})


def test_clients_that_leave_are_forgotten(server):
    """One leaves in the middle of an answer, one before it, one in the middle of a request."""
    whole = json.dumps({"prompt": "Emma", "max_tokens": 3000, "temperature": 2, "stream": True, "seed": 3})
    for body, length, read in ((whole, len(whole), True), (whole, len(whole), False), (whole[:20], len(whole), False)):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            head = (
                "POST /v1/completions HTTP/1.1",
                "Host: localhost",
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


def test_many_clients_at_once(server, served):
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
            assert text == served.tokenizer.decode(generated(served, ids, count), skip_special_tokens=True)


def test_a_signal_lets_answers_end(served_folder):
    server = Server(served_folder)
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
    assert server.end(None) == 0
    assert server.lines[-1] == "stopped\n"
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", server.port))


def test_a_key_a_queue_and_a_time_limit(served_folder):
    server = Server(served_folder, "--max-waiting", "1", "--max-batch", "1", "--time-limit", "3", key="secret")
    other = openai.OpenAI(base_url=server.client.base_url, api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
        other.models.list()
    other.close()
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
def test_flags_that_are_wrong(served_folder, flags, message, capsys):
    from recyc_jax.serve.__main__ import main

    assert main(["--model", str(served_folder), *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken(served_folder, capsys):
    from recyc_jax.serve.__main__ import main

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--model", str(served_folder), "--port", str(port)]) == 2
    assert "another server may listen there: pass --port" in capsys.readouterr().err
    assert os.environ.get("RECYC_JAX_API_KEY") is None
