"""Many clients of one server, for as long as you like: `python tests/serve_load.py --seconds 600 --clients 64`.

Starts `python -m recyc_jax.serve` on a tiny random model. Each client asks again and again: prompts of ragged lengths, some
as conversations that go on, some streamed and read slowly, some left in the middle, some that are no JSON. Every greedy
answer that was read to its end is compared with what `rj.generate` makes of the prompt alone. Prints the errors that are
not a client's own, latencies, and the server's memory over time."""

import argparse
import collections
import json
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import openai
import serving
from checkpoints import write_folder

import recyc_jax as rj


def memory_mib(pid):
    """The resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"no memory of process {pid} is told")


class Load:
    """What the clients share."""

    def __init__(self, server, seconds):
        self.server, self.until = server, time.monotonic() + seconds
        self.counts, self.seconds, self.first, self.asked = collections.Counter(), [], [], []
        self.lock = threading.Lock()

    def client(self, number):
        rng = random.Random(number)
        while time.monotonic() < self.until:
            try:
                self.one(rng)
            except openai.APIStatusError as error:
                self.counts[f"status {error.status_code}"] += 1
            except Exception as error:
                self.counts[f"{type(error).__name__}: {error}"[:80]] += 1

    def one(self, rng):
        kind = rng.random()
        if kind < 0.05:
            status, _ = self.server.ask("POST", "/v1/completions", "{]", content_type="application/json")
            self.counts["bad JSON refused" if status == 400 else f"bad JSON: {status}"] += 1
            return
        ids = [rng.randrange(3, 400) for _ in range(rng.choice((5, 20, 50, 120)))]
        for _turn in range(rng.choice((1, 1, 1, 3))):
            count = rng.randrange(1, 33)
            options = dict(model="tiny", prompt=ids, max_tokens=count, temperature=0)
            began = time.monotonic()
            if kind < 0.4:
                text = self.streamed(rng, options, began, leaves=kind < 0.1)
                if text is None:
                    return
            else:
                text = self.server.client.completions.create(**options).choices[0].text
            with self.lock:
                self.seconds.append(time.monotonic() - began)
                self.asked.append((ids, count, text))
            self.counts["answered"] += 1
            ids = [*ids, *(rng.randrange(3, 400) for _ in range(8))]

    def streamed(self, rng, options, began, leaves):
        text, stream = "", self.server.client.completions.create(**options, stream=True)
        for chunk in stream:
            if not text:
                self.first.append(time.monotonic() - began)
            text += chunk.choices[0].text
            if leaves:
                stream.close()
                self.counts["left"] += 1
                return None
            if rng.random() < 0.1:
                time.sleep(0.3)
        return text


def main():
    """Run it; exit status 1 if anything went wrong that is not a client's own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--checked", type=int, default=300, help="answers that are made again")
    config = parser.parse_args()
    folder = Path(tempfile.mkdtemp()) / "model"
    write_folder(folder)
    server = serving.Server(folder, "--max-waiting", str(2 * config.clients), "--kept-gib", "0.05")
    load = Load(server, config.seconds)
    threads = [threading.Thread(target=load.client, args=(number,)) for number in range(config.clients)]
    for thread in threads:
        thread.start()
    minutes = []
    while any(thread.is_alive() for thread in threads):
        time.sleep(min(60, max(1, load.until - time.monotonic())))
        minutes.append(round(memory_mib(server.process.pid)))
        print(f"{memory_mib(server.process.pid):.0f} MiB, {sum(load.counts.values())} requests", flush=True)
        for thread in threads:
            thread.join(1)
    _, figures = server.ask("GET", "/metrics")
    status = server.end(signal.SIGTERM)
    lm = rj.load_pretrained(str(folder))
    checked = random.Random(0).sample(load.asked, min(config.checked, len(load.asked)))
    wrong = 0
    for ids, count, text in checked:
        out = rj.generate(lm.params, lm.config, [ids], policy=serving.POLICY, max_new_tokens=count)
        tokens = out.tokens[0, : int(out.lengths[0])]
        wrong += text != lm.tokenizer.decode(tokens, skip_special_tokens=True)
    told = {
        "requests": dict(load.counts),
        "checked": len(checked),
        "wrong": wrong,
        "seconds": {f"p{q}": round(float(np.percentile(load.seconds, q)), 2) for q in (50, 95, 99)},
        "first_token_seconds": {f"p{q}": round(float(np.percentile(load.first, q)), 2) for q in (50, 95, 99)},
        "memory_mib_by_minute": minutes,
        "exit_status": status,
        "traceback": "Traceback" in "".join(server.lines),
        "kept_tokens": [line for line in figures.splitlines() if line.startswith("recyc_jax_tokens_total")],
    }
    print(json.dumps(told, indent=1))
    expected = {"answered", "left", "bad JSON refused"}
    return int(bool(set(load.counts) - expected) or wrong or status or told["traceback"])


if __name__ == "__main__":
    sys.exit(main())
