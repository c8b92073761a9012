"""The pages: their links have targets, their Python runs, and their commands exist with the flags that they show."""

import importlib
import json
import re
import shlex

import jax
import pytest
from checkpoints import TEXT, write_folder
from conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NEEDS = {  # what a block needs that is not here, by a word of it
    "import openai": "a server that runs: tests/test_serve.py has the same calls",
    "sharding.mesh": "several devices: tests/test_meshes.py",
}
SLOW = {"README.md", "conversations.md"}  # tests/test_readme.py runs them, on SmolLM2


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target, anchor in re.findall(r"\]\((?!https?://|mailto:)([^)#\s]*)(#[^)\s]*)?\)", text):
        found = (page.parent / target).resolve() if target else page
        assert found.exists(), f"{page.name} links to {target}"
        if anchor and found.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor[1:] in slugs, f"{page.name} links to {target}{anchor}"


PYTHON = [
    pytest.param(page, number, id=f"{page.stem}-{number}")
    for page in PAGES
    if page.name not in SLOW
    for number, block in enumerate(blocks(page, "python"))
    if not any(word in block for word in NEEDS)
]


@pytest.mark.parametrize(("page", "number"), PYTHON)
def test_python_runs(page, number):
    with jax.numpy_dtype_promotion("standard"):  # as users have it
        exec(blocks(page, "python")[number], {"__name__": "example"})


@pytest.mark.slow  # CI always runs it
def test_the_notebook_says_what_it_does(tmp_path, monkeypatch, capsys):
    """Its cells run, on SmolLM2, and print what is stored in it."""
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "docs" / "motivation.ipynb").read_text())["cells"]
    names = {}
    with jax.numpy_dtype_promotion("standard"):
        for cell in (one for one in cells if one["cell_type"] == "code"):
            capsys.readouterr()
            exec("".join(cell["source"]), names)
    (stored,) = (output["text"] for output in cell["outputs"] if output["output_type"] == "stream")
    assert capsys.readouterr().out == "".join(stored)


def commands():
    """The lines that start this project's modules: (page, module, flags)."""
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in re.split(r"\n|&&", block.replace("\\\n", " ")):
                words = shlex.split(line, comments=True)
                for place, word in enumerate(words[:-1]):
                    if word == "-m" and words[place + 1].startswith(("recyc_jax", "eval.", "train.")):
                        yield page, words[place + 1], words[place + 2 :]


def test_commands_have_the_flags_that_pages_show(capsys):
    """Every flag is one that the module's --help lists. Whole command lines are run where their subject is tested."""
    helps, seen = {}, 0
    for page, module, words in commands():
        if module == "eval.harness":  # the harness's own flags
            continue
        if module not in helps:
            found = importlib.import_module(module)
            if hasattr(found, "__path__"):
                found = importlib.import_module(f"{module}.__main__")
            with pytest.raises(SystemExit) as ended:
                found.main(["--help"])
            assert ended.value.code == 0
            helps[module] = capsys.readouterr().out
        for word in words:
            if word.startswith("--"):
                assert word.partition("=")[0] in helps[module], f"{page.name}: {module} has no {word}"
        seen += 1
    assert seen > 20


SMALLER = {  # in place of what the pages show: a tiny model, few tokens, the hardware that is here
    **{"--model": "MODEL", "--backend": "cpu", "--mesh": "data=1", "--fsdp": "1", "--out": "OUT", "--data": "t=TEXTS"},
    **{"--lengths": "720", "--samples": "1", "--batch-size": "2", "--accumulate": "1", "--tasks": "niah_single_1"},
    **{
        "--length": "64",
        "--steps": "2",
        "--stride": "12",
        "--budget": "8",
        "--dtype": "float32",
        "--domains": "t=TEXTS",
    },
}
RULER = ("--model", "--lengths", "--samples", "--tasks", "--out", "--batch-size")
MORE = {  # flags that a command also needs to be small
    "recyc_jax": ["--model", "MODEL", "--max-new-tokens", "4"],
    "recyc_jax.inspect": ["--model", "MODEL", "--max-new-tokens", "4", "--out", "OUT/page.html"],
    "eval.language_modeling": ["--model", "MODEL", "--sequences", "1", "--new-tokens", "4"],
    "eval.attention_overlap": ["--model", "MODEL", "--sources", "t=TEXTS", "--length", "64", "--new-tokens", "4"],
    "eval.speed": ["--repeats", "1"],
    "train.continued_pretrain": ["--held-out", "0", "--no-export"],
}
ELSEWHERE = {  # commands that other tests run
    "recyc_jax.serve": "a server does not end: tests/test_serve.py",
    "eval.harness": "TASK is the user's: tests/test_harness.py",
}


def smaller(module, words, names):
    """The command with `SMALLER` values, and `MORE` flags; what `--estimate` prints needs neither."""
    if "--estimate" in words:
        return words
    wanted, more = list(words), list(MORE.get(module, []))
    if module == "eval.ruler":
        more += [part for flag in RULER for part in (flag, SMALLER[flag])]
    if module.startswith(("eval", "train")):
        more += ["--out", "OUT"]
    if module == "train.continued_pretrain":
        more += [part for flag in ("--model", "--data", "--length", "--steps") for part in (flag, SMALLER[flag])]
    given = {word for word in wanted if word.startswith("--")}
    for flag, value in zip(more, [*more[1:], ""], strict=True):
        if flag.startswith("--") and flag not in given:
            wanted += [flag] if value.startswith("--") or not value else [flag, value]
            given.add(flag)
    for place, flag in enumerate(wanted):
        if flag in SMALLER and place + 1 < len(wanted):
            wanted[place + 1] = SMALLER[flag]
    for name, value in names.items():
        wanted = [word.replace(name, value) for word in wanted]
    return wanted


COMMANDS = [
    pytest.param(module, words, id=f"{page.stem}-{module}-{number}")
    for number, (page, module, words) in enumerate(commands())
    if module not in ELSEWHERE
    and (page.parent.name != "results" or "--estimate" in words or module == "eval.comparison")
]


@pytest.mark.parametrize(("module", "words"), COMMANDS)
def test_commands_of_the_pages_run(module, words, tmp_path, call_module, monkeypatch):
    """Of docs/results/ those that need neither a model nor hardware; the others are records of measurements, whose pages
    name what they ran on."""
    write_folder(tmp_path / "model", context=32768)
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(4):
        (texts / f"{number}.txt").write_text(f"Document {number}. {TEXT}" * 40)
    names = {"MODEL": str(tmp_path / "model"), "OUT": str(tmp_path / "out"), "TEXTS": str(texts)}
    monkeypatch.chdir(ROOT)
    ran = call_module(module, *smaller(module, words, names))
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.strip()
