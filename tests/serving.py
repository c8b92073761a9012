"""A tiny model to be served, and a process that serves."""

import contextlib
import http.client
import json
import re
import signal
import subprocess
import sys
import threading

import pytest
from checkpoints import write_folder
from conftest import environment

import recyc_jax as rj

POLICY = "lookahead:budget=8,stride=4"
TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
STORY = 4 * (
    "It was a truth universally acknowledged, that Emma Woodhouse, handsome, clever, and rich, had lived 21 years. "
)


@pytest.fixture(scope="module")
def served_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve") / "model"
    write_folder(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def served(served_folder):
    return rj.load_pretrained(str(served_folder))


def generated(lm, ids, count, **options):
    out = rj.generate(lm.params, lm.config, [ids], policy=POLICY, max_new_tokens=count, **options)
    return out.tokens[0, : int(out.lengths[0])].tolist()


class Server:
    """A process that serves, and its address."""

    def __init__(self, folder, *flags, key=None):
        env = environment() | {"RECYC_JAX_API_KEY": key or "", "PYTHONUNBUFFERED": "1"}
        of = ["--model", str(folder), "--name", "tiny", "--policy", POLICY, "--port", "0"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "recyc_jax.serve", *of, *flags],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        self.lines, self.port = [], None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"http://127\.0\.0\.1:(\d+)/v1", line):
                self.port = int(found[1])
                break
        assert self.port is not None, "".join(self.lines)
        self.reads = threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True)
        self.reads.start()
        import openai  # here, so that other tests run without it

        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key or "none", max_retries=0)

    def ask(self, method, path, body=None, **headers):
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            response = connection.getresponse()
            return response.status, response.read().decode()

    def figure(self, name):
        _, text = self.ask("GET", "/metrics")
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    def end(self, number=signal.SIGTERM, timeout=60):
        """The exit status after a signal (None: one was sent before)."""
        if number is not None:
            self.process.send_signal(number)
        status = self.process.wait(timeout)
        self.reads.join(10)
        self.process.stderr.close()
        self.client.close()
        return status
