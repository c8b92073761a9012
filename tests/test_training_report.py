"""`python -m train.report`: its tables against numbers computed by hand."""

import json

import pytest

from train import report


def run(folder, name, steps):
    """The folder of a run whose windows have the losses `steps`: {step: {policy: losses}}."""
    (folder / name).mkdir()
    rows = [{"kind": "train", "step": 1}]
    for step, policies in steps.items():
        for policy, each in policies.items():
            measured = {"kind": "evaluation", "step": step, "policy": policy, "length": 64, "new_tokens": 8}
            rows += [measured | {"domain": f"d{number}", "each": [one]} for number, one in enumerate(each)]
    (folder / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def test_changes_and_distances_are_paired(tmp_path):
    before = {"full": [1.0, 3.0], "snapkv:budget=8": [1.5, 3.5]}
    between = {"full": [9.0, 9.0], "snapkv:budget=8": [9.0, 9.0]}
    after = {"full": [1.0, 3.0], "snapkv:budget=8": [1.1, 3.3]}
    mine = run(tmp_path, "mine", {0: before, 4: between, 9: after})
    rows = (mine / "metrics.jsonl").read_text()
    (mine / "metrics.jsonl").write_text(rows + rows.splitlines()[-1])  # one domain was measured again
    text = report.tables([mine])
    assert "The last 8 of 64 tokens:" in text
    heading, rule, full, snapkv = text.splitlines()[-4:]
    assert heading.endswith("| above full before | after |")
    assert {line.count("|") for line in (heading, rule, full, snapkv)} == {8}
    assert full == "| mine | `full` | 7.389 | 7.389 | +0.0000 ± 0.0000 | - | - |"
    # exp(2.5), exp(2.2); mean of -0.4 and -0.2; of 0.5 and 0.5; of 0.1 and 0.3
    assert snapkv == (
        "| mine | `snapkv:budget=8` | 12.182 | 9.025 | -0.3000 ± 0.1000 | +0.5000 ± 0.0000 | +0.2000 ± 0.1000 |"
    )


def test_runs_on_the_same_windows_are_compared(tmp_path):
    first = run(tmp_path, "first", {0: {"full": [1.0, 3.0]}, 9: {"full": [1.0, 2.0]}})
    second = run(tmp_path, "second", {0: {"full": [1.001, 3.0]}, 9: {"full": [0.8, 1.4]}})
    lost = run(tmp_path, "lost", {0: {"full": [1.0, 3.0]}, 9: {"full": [float("nan"), 1.4]}})
    others = run(tmp_path, "others", {0: {"full": [3.0, 1.0]}, 9: {"full": [0.8, 1.4]}})
    lines = report.tables([first, second, lost, others]).splitlines()
    assert lines[2].endswith("| after | above first, after |")
    assert {line.count("|") for line in lines[2:]} == {9}
    assert [line.split("|")[-2].strip() for line in lines[-4:]] == ["-", "-0.4000 ± 0.2000", "+nan ± nan", "-"]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ({0: {"full": [1.0]}}, "evaluations of steps [0]; one before training and one after are needed"),
        ({3: {"full": [1.0]}, 4: {"full": [1.0]}}, "evaluations of steps [3, 4]"),
        ({0: {"full": [1.0]}, 4: {"snapkv:budget=8": [1.0]}}, "full was measured before training and not after"),
    ],
)
def test_a_run_without_both_ends_is_refused(tmp_path, capsys, steps, message):
    assert report.main([str(run(tmp_path, "mine", steps))]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1


def test_a_torn_last_line_is_passed_over_with_a_word(tmp_path, capsys):
    mine = run(tmp_path, "mine", {0: {"full": [1.0]}, 4: {"full": [0.5]}})
    with (mine / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "evaluation", "step": 8, "pol')
    assert report.main([str(mine)]) == 0
    assert capsys.readouterr().err == f"{mine}/metrics.jsonl: the last line is torn and is passed over\n"


def test_a_loss_that_a_float_cannot_hold_the_exponential_of(tmp_path):
    mine = run(tmp_path, "mine", {0: {"full": [1.0, 2.0]}, 4: {"full": [5000.0, 5001.0]}})
    assert "| 4.482 | not finite | +4999.0000 ± 0.0000 |" in report.tables([mine])


@pytest.mark.parametrize("change", [{"each": [[1]]}, {"each": []}, {"step": "0"}, {"policy": 3}, {"length": True}])
def test_other_files_are_named(tmp_path, change):
    mine = run(tmp_path, "mine", {0: {"full": [1.0]}, 4: {"full": [0.5]}})
    rows = [json.loads(line) for line in (mine / "metrics.jsonl").read_text().splitlines()]
    (mine / "metrics.jsonl").write_text("".join(json.dumps(row | change) + "\n" for row in rows))
    with pytest.raises(ValueError, match=rf"metrics\.jsonl: an evaluation's {next(iter(change))} is .*: no metrics"):
        report.tables([mine])


def test_no_folder_and_no_file(tmp_path, capsys):
    assert report.main([]) == 2
    assert "name the folders" in capsys.readouterr().err
    assert report.main([str(tmp_path / "none")]) == 2
    assert "No such file" in capsys.readouterr().err
