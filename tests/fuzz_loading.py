"""Damaged files of models: `python tests/fuzz_loading.py --seconds 3600`.

Small valid checkpoints (a Hugging Face folder, a GGUF file, a saved state) are damaged at random: bytes and numbers
changed, parts cut out, put in or exchanged, values of JSON replaced. Loading must give a model, or a ValueError or OSError,
within half a minute and a limit on memory. Prints what does anything else, with the seed that makes it again
(`--first SEED --cases 1`); exit status 1 if there was any."""

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

SECONDS_A_CASE = 30
MEMORY = 6 * 2**30  # of address space beyond what the process has at first
NUMBERS = (0, 1, 2, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)


def damaged_bytes(data, rng):
    """The bytes with one to four changes."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not data:
            break
        # headers are at the front, and where most can go wrong
        at = rng.randrange(min(len(data), rng.choice((64, 2048, len(data)))))
        kind = rng.randrange(6)
        if kind == 0:
            data[at] = rng.randrange(256)
        elif kind == 1:
            layout = rng.choice(("<I", "<Q"))
            number = struct.pack(layout, rng.choice(NUMBERS) % 2 ** (8 * struct.calcsize(layout)))
            data[at : at + len(number)] = number
        elif kind == 2:
            del data[at : at + rng.choice((1, 8, 100, len(data)))]
        elif kind == 3:
            data[at:at] = rng.randbytes(rng.choice((1, 8, 100)))
        elif kind == 4:
            data[at:at] = data[at : at + rng.choice((1, 8, 100, 4000))]
        else:
            other = rng.randrange(len(data))
            size = rng.choice((1, 4, 8, 32))
            data[at : at + size], data[other : other + size] = data[other : other + size], data[at : at + size]
    return bytes(data)


def damaged_json(text, rng):
    """The JSON with one value replaced, or a key taken out or put in."""
    value = json.loads(text)
    places = []

    def walk(node):
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, inner in list(items)[:200]:
            places.append((node, key))
            walk(inner)

    walk(value)
    if not places:
        return text
    node, key = rng.choice(places)
    odd = (None, True, -1, 0, 1e308, 2**70, "", "x" * 1000, "../../x", [], {}, [[]], {"": 0}, float("1e-320"))
    kind = rng.randrange(3)
    if kind == 0:
        node[key] = rng.choice(odd)
    elif kind == 1 and isinstance(node, dict):
        del node[key]
    elif isinstance(node, dict):
        node[rng.choice(("x", "rope_scaling", "layer_types", "model_type", "head_dim", "quantization_config"))] = (
            rng.choice(odd)
        )
    else:
        node[key] = node[rng.randrange(len(node))]
    return json.dumps(value)


def damage(file, rng):
    data = file.read_bytes()
    if file.suffix == ".json" and rng.random() < 0.8:
        with contextlib.suppress(ValueError):
            file.write_text(damaged_json(data.decode(), rng))
            return
    file.write_bytes(damaged_bytes(data, rng))


def prepared(folder):
    """The valid files: a folder, a GGUF file, a state."""
    import gguf_files
    from checkpoints import write_folder

    import recyc_jax as rj

    write_folder(folder / "model")
    gguf_files.write(folder / "model.gguf", *gguf_files.model())
    lm = rj.load_pretrained(str(folder / "model"))
    state = rj.prefill(lm.params, lm.config, [[5, 6, 7, 8]], policies="lookahead:budget=4,stride=2", max_new_tokens=4)
    state.save(folder / "state", lm.params, lm.config)
    return lm


def one(seed, folder, work, lm):
    """Damage a file of a copy, and load it."""
    import recyc_jax as rj

    rng = random.Random(seed)
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(folder, work)
    what = rng.choice(("model", "model.gguf", "state"))
    files = sorted(
        file for file in ([work / what] if (work / what).is_file() else (work / what).rglob("*")) if file.is_file()
    )
    damage(rng.choice(files), rng)
    if what == "state":
        rj.load_state(work / what, lm.params, lm.config)
    else:
        loaded = rj.load_pretrained(str(work / what))
        loaded.tokenizer("x")


def late(number, frame):
    raise TimeoutError(f"it took more than {SECONDS_A_CASE} s")


def run(first, cases, until):
    """One process's cases; returns its finds."""
    finds = []
    base = Path(tempfile.mkdtemp())
    os.environ["RECYC_JAX_CACHE"] = str(base / "cache")
    folder, work = base / "valid", base / "work"
    lm = prepared(folder)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    signal.signal(signal.SIGALRM, late)
    done = {"loaded": 0, "refused": 0}
    for seed in range(first, first + cases):
        if time.monotonic() > until:
            break
        print(f"seed {seed}", file=sys.stderr, flush=True)  # the last one, if the process crashes
        signal.alarm(SECONDS_A_CASE)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                one(seed, folder, work, lm)
            done["loaded"] += 1
        except (ValueError, OSError) as error:
            if isinstance(error, TimeoutError) or len(str(error).splitlines()) > 3:
                finds.append((seed, traceback.format_exc(limit=-4)))
            done["refused"] += 1
        except BaseException as error:  # panics of Rust are no Exceptions
            if isinstance(error, KeyboardInterrupt):
                raise
            finds.append((seed, traceback.format_exc(limit=-4)))
        finally:
            signal.alarm(0)
        shutil.rmtree(base / "cache", ignore_errors=True)
    shutil.rmtree(base, ignore_errors=True)
    return done, finds


def main():
    """Run the cases and print the finds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--cases", type=int, default=10**9)
    config = parser.parse_args()
    done, finds = run(config.first, config.cases, time.monotonic() + config.seconds)
    for seed, text in finds:
        print(f"--- seed {seed}\n{text}")
    print(f"{done['loaded']} loaded all the same, {done['refused']} refused, {len(finds)} finds")
    return int(bool(finds))


if __name__ == "__main__":
    sys.exit(main())
