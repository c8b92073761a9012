"""The training command: whole runs, what it refuses, and its flags and files."""

import errno
import shutil
from pathlib import Path

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from conftest import environment
from training_runs import finish, metrics, saved_steps, train_rows

import recyc_jax as rj
from recyc_jax import training_implementations
from recyc_jax.commands import corpus as token_files
from recyc_jax.commands import documents
from train import checkpoint, data
from train import evaluation as evaluation_of_run
from train.config import Config, with_files


@pytest.mark.parametrize("recycle", [pytest.param("paper", marks=pytest.mark.slow), "strided", "off"])
def test_a_whole_run_with_evaluation_and_export(training_command, tmp_path, recycle):
    out = tmp_path / "run"
    evaluation = dict(held_out=0.2, eval_every=2, eval_new_tokens=8, eval_sequences=2, eval_lengths=60)
    arguments = training_command(out, "--tensorboard", export=True, recycle=recycle, steps=3, **evaluation)
    if recycle == "strided":  # also evaluate the same tokens with less context
        arguments.insert(arguments.index("--eval-lengths") + 1, "40")
    done = finish(arguments)
    assert done.returncode == 0, done.stderr
    rows = metrics(out)
    evaluated = [row for row in rows if row["kind"] == "evaluation"]
    assert sorted({row["step"] for row in evaluated}) == [0, 2, 3]
    assert len(evaluated) == (18 if recycle == "strided" else 9)
    evaluated = [row for row in evaluated if row["length"] == 60]
    full = {row["step"]: row["nll"] for row in evaluated if row["policy"] == "full"}
    assert full[3] < full[0]
    assert (out / "loss.png").stat().st_size > 5000
    assert list((out / "tensorboard").glob("events*"))
    # the exported folder loads as a model and gives the perplexity that the run reported
    lm = rj.load_pretrained(str(out / "model"))
    texts = documents.load(arguments[arguments.index("--data") + 1])
    corpus = token_files.tokenize([texts], lm.tokenizer, tmp_path / "tokens")
    held = data.hold_out(corpus, 0.2, 60, 42)[1]
    assert len(held) == 2
    windows = evaluation_of_run.windows(corpus, held, 60, 2, 42)
    scores = rj.score(lm.params, lm.config, jnp.asarray(windows.tokens), policy=rj.FullAttention(), context_length=52)
    np.testing.assert_allclose(-scores.mean(), full[3], rtol=1e-5)


def test_the_export_loads_in_transformers(training_command, tmp_path):
    torch = pytest.importorskip(
        "torch", reason="torch is not installed: the export was not read by transformers' models"
    )
    from transformers import AutoModelForCausalLM

    out = tmp_path / "run"
    assert finish(training_command(out, steps=1, export=True)).returncode == 0
    theirs = AutoModelForCausalLM.from_pretrained(out / "model").eval()
    lm = rj.load_pretrained(str(out / "model"))
    tokens = np.arange(40)[None] % lm.config.vocab_size
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(rj.forward(lm.params, lm.config, tokens), expected, atol=1e-4)


def test_packed_rows_without_a_fused_kernel_are_announced(training_command, tmp_path, monkeypatch):
    monkeypatch.setattr(training_implementations, "_capability", lambda: "9.0")
    said = [
        finish(training_command(tmp_path / "run", "--dry-run", *more, recycle="off", dtype="bfloat16")).stdout
        for more in ((), ("--no-pack", "--attention", "reference"))
    ]
    assert ["packed rows are read by plain JAX" in one for one in said] == [True, False]


def test_a_dry_run_allocates_nothing_and_says_what_would_be(training_command, run_module, tmp_path):
    command = training_command(tmp_path / "run", "--dry-run", fsdp=2, tensor=2)
    done = run_module(*command, env=environment("--xla_force_host_platform_device_count=8"))
    assert done.returncode == 0, done.stderr
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    assert said["mesh"] == "data 2 x fsdp 2 x tensor 2 on 8 x cpu"
    assert said["parameters"] == f"{count_of(rj.LlamaConfig.tiny(vocab_size=400)):,}"
    assert said["steps"] == "12, 512 tokens each"
    assert "GiB" in said["memory a device"]
    assert not (tmp_path / "run" / "checkpoints").exists()


def count_of(config):
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda: rj.init_params(config, jax.random.key(0)))))


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (dict(stride=13), "recycle's prefix was 52 and is 51 now"),
        (dict(warmup_steps=3), "training's warmup_steps was 5 and is 3 now"),
        (dict(seed=1), "data's seed was 42 and is 1 now"),
    ],
)
def test_another_configuration_is_refused(training_command, straight_run, flags, what):
    refused = finish(training_command(straight_run, **flags))
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert f"holds a run of another configuration: {what}" in refused.stderr


def test_a_run_grows_by_steps(training_command, straight_run, tmp_path):
    """More steps go on from the last one, wherever the model lies; fewer than were taken are refused."""
    out, command = tmp_path / "run", training_command(tmp_path / "run", steps=13)
    shutil.copytree(straight_run, out)
    model = command.index("--model") + 1
    shutil.copytree(command[model], tmp_path / "the same model")
    command[model] = f"{tmp_path}/the same model/"
    done = finish(command)
    assert done.returncode == 0, done.stderr
    assert "--steps was 12 and is 13 now" in done.stdout
    assert "goes on from step 12, to step 13" in done.stdout
    assert train_rows(out)[:-1] == train_rows(straight_run)
    fewer = finish(training_command(out, steps=8))
    assert fewer.returncode == 2
    assert "--steps 8: the run in --out" in fewer.stderr
    assert "has taken 13; name at least as many" in fewer.stderr


def test_a_forced_run_goes_on_with_another_configuration(training_command, straight_run, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(straight_run, out)
    done = finish(training_command(out, "--force", steps=13, clip=0.5))
    assert done.returncode == 0, done.stderr
    assert "WARNING: --force: training's clip was 1.0 and is 0.5 now" in done.stdout
    assert train_rows(out)[:-1] == train_rows(straight_run)
    other = finish(training_command(out, "--force", steps=13, optimizer="adafactor"))
    assert other.returncode == 2
    assert "holds checkpoints of another shape" in other.stderr


def test_numbers_that_are_not_finite_end_the_run_and_are_not_kept(training_command, tmp_path):
    out = tmp_path / "run"
    done = finish(training_command(out, learning_rate=1e30, warmup_steps=0, max_bad_steps=3, clip=0, save_every=1))
    assert done.returncode == 1
    assert "3 steps in a row" in done.stderr
    assert "loss or gradients are not finite; the update is left out" in done.stdout
    kept = saved_steps(out)
    assert kept
    rows = metrics(out)
    assert rows[-1]["skipped"] == 3
    assert rows[-1]["loss"] is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(data="poems"), "--data: 'poems' is unknown"),
        (dict(data="t=nowhere.txt"), "there is no such file or folder"),
        (dict(length=400, batch_size=80), "rows of --length 400 are fewer than --batch-size 80"),
        (dict(stride=64), "--stride 64 leaves no context of --length 64"),
        (dict(budget=0), "budget=0 must be at least 1"),
        (dict(budget=1.5), "--budget 1.5: a fraction must lie in 0..1"),
        (dict(length=1000), "exceeds the model's context of 512"),
        (dict(accumulate=3), "--accumulate 3 does not divide --batch-size 8"),
        (dict(tensor=2), "does not divide the 1 devices"),
        (dict(held_out=0.2, eval_lengths=500), "one of at least 500 tokens (--eval-lengths)"),
        (dict(held_out=0.2, eval_new_tokens=64), "--eval-new-tokens 64 leaves no context of --eval-lengths 64"),
        (dict(model="nowhere"), "model 'nowhere' is neither"),
        (dict(preset="poem"), "--preset 'poem': there is paper"),
        (dict(attention="cudnn"), "--attention cudnn needs an NVIDIA GPU"),
        (dict(steps=-1), "--steps -1 must not be negative"),
        (dict(save_minutes=-1), "--save-minutes -1.0 must be a number of at least 0"),
        (dict(epochs=3), "--epochs 3.0 needs --steps 0"),
        (dict(optimizer="adafactor", weight_decay=0.1), "--weight-decay 0.1 goes with --optimizer adamw alone"),
    ],
    ids=str,
)
def test_bad_input_ends_in_one_line(training_command, call_module, tmp_path, flags, message):
    done = call_module(*training_command(tmp_path / "run", **flags))
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_bad_input_ends_a_process_with_status_2(training_command, run_module, tmp_path):
    done = run_module(*training_command(tmp_path / "run", stride=64))
    assert done.returncode == 2
    assert done.stderr == "error: --stride 64 leaves no context of --length 64\n"


def test_checkpoints_by_time(training_command, tmp_path):
    done = finish(training_command(tmp_path / "run", steps=3, save_every=0, save_minutes=1e-9))
    assert done.returncode == 0, done.stderr
    assert saved_steps(tmp_path / "run") == [1, 2, 3]
    finish(training_command(tmp_path / "last", steps=3, save_every=0, save_minutes=0))
    assert saved_steps(tmp_path / "last") == [3]


def test_the_start_says_what_of_the_texts_is_used(training_command, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(12):
        (texts / f"{number}.txt").write_text(checkpoints.TEXT * 4 if number else "short.")
    (texts / "empty.txt").write_text("\ufeff\n")
    done = finish(training_command(tmp_path / "run", "--dry-run", data=f"mine={texts}"))
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("data mine: "))
    assert line.startswith("data mine: 12 documents, ")
    assert "dropped, shorter than a row: 1 documents, " in line
    assert line.endswith("left out: 1 documents without any text")


@pytest.mark.parametrize("name", ["runs [lr 1e-4]/a", "a*b?", "größer, 100% #1"])
def test_any_folder_name_keeps_its_checkpoints(training_command, tmp_path, name):
    assert finish(training_command(tmp_path / name, steps=2)).returncode == 0
    done = finish(training_command(tmp_path / name, steps=3))
    assert "goes on from step 2" in done.stdout, done.stderr


def test_the_exported_model_may_be_a_link(training_command, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run/model").symlink_to(tmp_path / "elsewhere")
    for steps in (1, 2):
        done = finish(training_command(tmp_path / "run", export=True, steps=steps))
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "elsewhere/model.safetensors").is_file()
    assert (tmp_path / "run/model").is_symlink()
    assert not list(tmp_path.glob(".*"))


def test_other_files_in_the_place_of_the_model_are_not_replaced(training_command, tmp_path):
    (tmp_path / "run/model").mkdir(parents=True)
    (tmp_path / "run/model/thesis.tex").write_text("years of work")
    done = finish(training_command(tmp_path / "run", export=True))
    assert done.returncode == 2
    assert "model holds something else than a model" in done.stderr


def test_a_full_disk_ends_in_one_line_and_the_run_goes_on(training_command, tmp_path, monkeypatch):
    out = tmp_path / "run"
    save = checkpoint.Checkpoints.save

    def full(self, step, *args):
        if step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(self, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", full)
        done = finish(training_command(out, steps=6, save_every=2))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: no space left in {out} ")
    assert done.stderr.count("\n") == 1
    assert "goes on from step 2" in finish(training_command(out, steps=6, save_every=2)).stdout


def test_a_bucket_is_refused(training_command):
    done = finish(training_command("gs://bucket/run"))
    assert done.returncode == 2
    assert "--out gs://bucket/run: results are written to a folder of this machine" in done.stderr


def test_a_folder_that_cannot_be_written_is_refused(training_command, tmp_path):
    file = tmp_path / "file"
    file.touch()
    done = finish(training_command(file / "run"))
    assert done.returncode == 2
    assert f"--out {file / 'run'}: Not a directory" in done.stderr


def test_presets_and_files_stand_for_flags_that_others_win_over(tmp_path):
    def parsed(*arguments):
        return tyro.cli(Config, args=with_files(list(arguments)))

    config = parsed("--stride", "25", "--preset", "paper")
    assert (config.length, config.stride, config.budget, config.learning_rate) == (8242, 25, 2048, 5e-6)
    assert len(config.eval_policies) == 5
    file = tmp_path / "mine.yaml"
    file.write_text("batch-size: 2\nout: here\nrecycle: off\npack: false\neval_policies: full\nlearning_rate: 5e-6\n")
    config = parsed(f"--config={file}")
    assert (config.batch_size, config.out, config.recycle, config.pack) == (2, Path("here"), "off", False)
    assert (config.eval_policies, config.learning_rate) == (("full",), 5e-6)
    file.write_text("batchsize: 2\n")
    with pytest.raises(ValueError, match="'batchsize' is no setting"):
        parsed(f"--config={file}")
    file.write_text("steps: 3.5\n")
    with pytest.raises(SystemExit):
        parsed(f"--config={file}")
