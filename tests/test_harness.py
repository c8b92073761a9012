"""The adapter for the lm-evaluation-harness, beside the harness's own Hugging Face model on the same tiny checkpoint."""

import json

import pytest
from checkpoints import TEXT, write_folder

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance

import recyc_jax as rj
from eval.harness.model import RecycJax

LAYERS = 2
QUESTIONS = ["The grass is", "What is the special magic number? ", "Emma", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness") / "model"
    write_folder(folder, context=128)
    return folder


@pytest.fixture(scope="module")
def theirs(folder):
    pytest.importorskip("torch", reason="the harness's own model needs the extra reference")
    pytest.importorskip("accelerate", reason="the harness's own model needs accelerate")
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=2)


def model(folder, policy="full", **options):
    return RecycJax(str(folder), policy, backend="cpu", **options)


def requests(kind, arguments):
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


PAIRS = [(question, end) for question in QUESTIONS for end in (" green", " 4217350. It was a truth", " x")]
LONG = [(TEXT * 2, " green"), ("Emma", TEXT)]  # beyond the model's context of 128 tokens: cut from the left


def test_likelihoods_are_the_harness_own(folder, theirs):
    for batch_size in (1, 3):
        ours = model(folder, batch_size=batch_size)
        got = ours.loglikelihood(requests("loglikelihood", PAIRS + LONG[:1]), disable_tqdm=True)
        want = theirs.loglikelihood(requests("loglikelihood", PAIRS + LONG[:1]), disable_tqdm=True)
        assert [likely for _, likely in got] == [likely for _, likely in want]
        assert [score for score, _ in got] == pytest.approx([score for score, _ in want], abs=1e-3)


def test_rolling_likelihoods_are_the_harness_own(folder, theirs):
    texts = [("The grass is green.",), (TEXT,), (TEXT * 2,)]
    got = model(folder).loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)
    want = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)
    assert got == pytest.approx(want, rel=1e-4)


def test_texts_are_the_harness_own(folder, theirs):
    asked = [
        (question, {"until": until, "max_gen_toks": count})
        for question in QUESTIONS[:3]
        for until, count in (([], 20), (["e", "7"], 20), ("<eos>", 5))
    ]
    got = model(folder, batch_size=2).generate_until(requests("generate_until", asked), disable_tqdm=True)
    assert got == theirs.generate_until(requests("generate_until", asked), disable_tqdm=True)


def test_a_policy_acts(folder):
    """A context beyond the budget is scored as `rj.score` scores it under the policy, and not as under full attention."""
    policy, ids = "lookahead:budget=8;stride=5", model(folder).tok_encode(TEXT * 3)[:100]
    ours = model(folder, policy)
    ((got, _),) = ours._loglikelihood_tokens([(None, ids[:70], ids[70:])], disable_tqdm=True)
    lm = rj.load_pretrained(str(folder))

    def scored(policy):
        return float(rj.score(lm.params, lm.config, [ids], policy=policy, context_length=70).sum())

    assert got == pytest.approx(scored("lookahead:budget=8,stride=5"), abs=1e-3)
    assert abs(got - scored("full")) > 0.01


def test_repeated_requests_draw_anew_whatever_the_batch(folder):
    asked = requests("generate_until", [("Emma", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12})] * 4)
    one, four = (model(folder, batch_size=size).generate_until(asked, disable_tqdm=True) for size in (1, 4))
    assert len(set(one)) > 1
    assert one == four


def test_a_special_token_that_stops_is_seen(folder):
    """Special tokens are left out of texts, so a stop string that is one can be found only as a token."""
    harness = model(folder)
    (plain,) = harness.generate_until(requests("generate_until", [("Emma", {"max_gen_toks": 12})]), disable_tqdm=True)
    first = harness.tokenizer.decode(harness.tokenizer.encode(plain)[3:4])
    harness.tokenizer.add_special_tokens({"additional_special_tokens": [first]})
    asked = requests("generate_until", [("Emma", {"max_gen_toks": 12, "until": [first]})])
    (stopped,) = harness.generate_until(asked, disable_tqdm=True)
    assert plain.startswith(stopped)
    assert len(stopped) < len(plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(policy="recycled:budget=x"), "budget"),
        (dict(batch_size="auto"), "batch_size=auto must be a whole number"),
        (dict(max_length=500), "max_length=500 must lie in 2..128"),
        (dict(pretrained="nowhere"), "nowhere"),
    ],
)
def test_what_cannot_be_had_is_said(folder, options, message):
    with pytest.raises(ValueError, match=message):
        RecycJax(**(dict(pretrained=str(folder), backend="cpu") | options))


def test_options_of_generation_that_are_unknown(folder):
    asked = requests("generate_until", [("Emma", {"num_beams": 4, "max_gen_toks": 4})])
    with pytest.raises(ValueError, match="num_beams cannot be had here"):
        model(folder).generate_until(asked)


TASK = """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc}]
"""


def test_the_command_runs_a_local_task(folder, tmp_path, run_module):
    rows = [{"question": question, "choices": [" green", " 4217350"], "gold": 0} for question in QUESTIONS[:3]]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "task.yaml").write_text(TASK % (tmp_path / "rows.jsonl"))
    flags = ("--tasks", "local_choice", "--include_path", tmp_path, "--output_path", tmp_path / "out")
    arguments = f"pretrained={folder},policy=lookahead:budget=8;stride=4"
    env = {"HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    ran = run_module("eval.harness", "--model_args", arguments, *flags, env=env)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "recyc_jax" in ran.stdout
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert 0 <= json.loads(results.read_text())["results"]["local_choice"]["acc,none"] <= 1
    wrong = run_module("eval.harness", "--model_args", "pretrained=nowhere", *flags, env=env)
    assert wrong.returncode == 2
    assert "nowhere" in wrong.stderr.splitlines()[-1]
