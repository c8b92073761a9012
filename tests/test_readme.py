"""The README: its links have targets, and its example runs."""

import re

import numpy as np
import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_links_lead_somewhere():
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target


@pytest.mark.slow  # CI always runs it
def test_the_example_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    names = {}
    exec(example, names)
    out, lm = names["out"], names["lm"]
    printed = capsys.readouterr().out
    assert lm.tokenizer.decode(np.asarray(out.tokens)[0, : int(out.lengths[0])]) in printed
    assert out.full_steps.shape == (2, 30)
    assert int(out.full_steps.max()) > 0


@pytest.mark.slow
def test_the_page_on_conversations_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it saves a state
    names = {}
    for example in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "conversations.md").read_text(), re.S):
        exec(example, names)
    assert "Paris" in capsys.readouterr().out
