"""Text in, text out: prompts, messages, stop strings, and conversations that read each turn once."""

import io

import jax
import pytest
from checkpoints import write_folder

import recyc_jax as rj
from recyc_jax.text import prompt_ids, share_read

TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
POLICY = "lookahead:budget=8,stride=4"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "model"
    write_folder(folder)
    return folder


@pytest.fixture
def lm(folder):
    lm = rj.load_pretrained(str(folder))
    lm.tokenizer.chat_template = TEMPLATE
    return lm


def answered(lm, ids, count, policy=POLICY):
    """The tokens that `generate` makes."""
    out = rj.generate(lm.params, lm.config, [ids], policy=policy, max_new_tokens=count)
    return out.tokens[0, : int(out.lengths[0])].tolist()


def check_answer(talk, lm, count):
    """The last answer is what `generate` makes of the tokens before it."""
    before = talk.tokens[: len(talk.tokens) - talk.figures.new_tokens]
    assert talk.tokens[len(before) :] == answered(lm, before, count, talk.policy)


def test_text_and_messages(lm):
    messages = [{"role": "user", "content": "What is green?"}]
    for prompt, text in (("The grass is", "The grass is"), (messages, "[user] What is green?\n[assistant] ")):
        reply = lm.generate(prompt, policy=POLICY, max_new_tokens=20)
        ids = lm.tokenizer(text)["input_ids"]
        assert reply.tokens == answered(lm, ids, 20)
        assert reply.text == lm.tokenizer.decode(reply.tokens, skip_special_tokens=True)
        assert reply.prompt_tokens == len(ids)
        assert reply.full_steps > 0
    both = lm.generate(["The grass is", messages], policy=POLICY, max_new_tokens=20)
    assert both.tokens[1] == reply.tokens
    assert len(both.text) == 2


def test_a_template_that_refuses_leaves_the_conversation(lm):
    lm.tokenizer.chat_template = "{{ raise_exception('no system here') if messages[0].role == 'system' }}" + TEMPLATE
    with pytest.raises(ValueError, match="chat template refuses these messages: no system here"):
        lm.generate([{"role": "system", "content": "a"}], policy=POLICY, max_new_tokens=2)
    talk = lm.conversation(policy=POLICY, max_new_tokens=2, system="brief")
    before = list(talk.messages)
    with pytest.raises(ValueError, match="no system here"):
        list(talk.ask("What is green?"))
    assert talk.messages == before


@pytest.mark.parametrize("prompts", [[1, 2], [[1, 2]], b"a", None, {"role": "user"}, [None]])
def test_what_is_no_prompt_is_said(lm, prompts):
    with pytest.raises(ValueError, match="token ids go to rj"):
        lm.generate(prompts, policy=POLICY, max_new_tokens=2, stop=None)


def test_half_a_surrogate_pair_is_refused(lm):
    for prompt in ("a\udc80b", [{"role": "user", "content": "a\udc80b"}]):
        with pytest.raises(ValueError, match=r"'\\udc80', half a surrogate pair: no tokenizer takes it"):
            lm.generate(prompt, policy=POLICY, max_new_tokens=2)


def test_a_fraction_is_of_the_prompt_and_its_answer(lm):
    prompt = "What is the special magic number?"
    tokens = len(prompt_ids(lm.tokenizer, prompt)) + 20
    half = lm.generate(prompt, policy="lookahead:budget=0.5,stride=4", max_new_tokens=20)
    assert (
        half.tokens == lm.generate(prompt, policy=f"lookahead:budget={tokens // 2},stride=4", max_new_tokens=20).tokens
    )


def test_an_answer_ends_at_a_stop_string(lm):
    whole = lm.generate("The grass is", max_new_tokens=40, eos_ids=())
    stop = whole.text[17:20]
    reply = lm.generate("The grass is", max_new_tokens=40, eos_ids=(), stop=["no such text", stop])
    assert reply.text == whole.text[: whole.text.index(stop)]
    assert reply.ended
    assert len(reply.tokens) <= 40
    with pytest.raises(ValueError, match="stop="):
        lm.generate("The grass is", stop=[""])


def test_a_conversation_reads_each_turn_once(lm):
    """Its answers are those of the whole text under full attention; changed turns are read again from the change on."""
    talk = lm.conversation(policy="full", max_new_tokens=24, system="Be brief.")
    for number, turn in enumerate(("What is green?", "And what else?", "Why?")):
        said = "".join(talk.ask(turn))
        check_answer(talk, lm, 24)
        assert talk.messages[-1] == {"role": "assistant", "content": said}
        before = len(talk.tokens) - talk.figures.new_tokens
        assert talk.figures.read_tokens < before / 2 or not number
    talk.messages = [*talk.messages[:2], {"role": "assistant", "content": "Grass."}]
    "".join(talk.ask("And what else?"))
    check_answer(talk, lm, 24)
    talk.policy = POLICY  # needs what the state was not asked to keep: all is read again
    "".join(talk.ask("Why?"))
    ids = prompt_ids(lm.tokenizer, talk.messages[:-1])
    assert talk.figures.read_tokens == len(ids)
    assert talk.tokens[len(ids) :] == answered(lm, ids, 24)
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "Be brief."}]
    with pytest.raises(ValueError, match="exceed the model's context"):
        list(talk.ask("green " * 9000))
    assert len(talk.messages) == 1


def test_an_answer_that_is_left_stays_as_far_as_it_was_read(lm):
    talk = lm.conversation(policy="full", max_new_tokens=200)
    pieces = talk.ask("What is green?")
    said = next(pieces) + next(pieces)
    pieces.close()
    assert talk.messages[-1]["content"] == said
    "".join(talk.ask("And what else?"))
    check_answer(talk, lm, 200)


def test_samples_of_a_conversation_follow_the_key(lm):
    def said(key):
        talk = lm.conversation(max_new_tokens=12, sampling=rj.Sample(1.0), key=jax.random.key(key))
        return "".join(talk.ask("What is green?"))

    assert said(0) == said(0) != said(1)


def test_a_conversation_that_is_saved_goes_on(lm, tmp_path):
    """With the tokens of one that was not, reading the turn alone; and a failed load changes nothing."""
    talk = lm.conversation(policy=POLICY, max_new_tokens=9)
    with pytest.raises(ValueError, match="nothing to save"):
        talk.save(tmp_path / "talk")
    "".join(talk.ask("What is green?"))
    talk.save(tmp_path / "talk")
    after = "".join(talk.ask("Why?"))
    other = lm.conversation(policy="full", max_new_tokens=9)
    other.load(tmp_path / "talk")
    assert other.policy == POLICY
    assert "".join(other.ask("Why?")) == after
    assert other.tokens == talk.tokens
    assert other.figures.read_tokens == talk.figures.read_tokens
    talk.state.save(tmp_path / "state")
    with pytest.raises(ValueError, match="without a conversation"):
        other.load(tmp_path / "state")
    assert other.tokens == talk.tokens
    with pytest.raises(ValueError, match="is not there"):
        other.load(tmp_path / "nowhere")


def test_the_share_that_a_step_reads():
    policy = rj.parse_policy(POLICY)
    assert share_read(rj.FullAttention(), 100, 7.0, 7) == 1
    assert share_read(policy, 100, 0.0, 10) == pytest.approx(0.08)
    assert share_read(policy, 100, 5.0, 10) == pytest.approx(0.54)
    assert share_read(policy, 6, 0.0, 10) == 1


def test_the_command(call_module, folder, tmp_path):
    document = tmp_path / "a text.txt"
    document.write_text("The grass is green.")
    flags = "--model", folder, "--file", document, "--policy", POLICY, "--max-new-tokens", 12, "--template", "base"
    ran = call_module("recyc_jax", "What is green?", *flags)
    assert ran.returncode == 0, ran.stderr
    lm = rj.load_pretrained(str(folder))
    want = answered(lm, lm.tokenizer("The grass is green.\n\nWhat is green?")["input_ids"], 12)
    assert ran.stdout == lm.tokenizer.decode(want, skip_special_tokens=True) + "\n"
    assert "12 made" in ran.stderr


def test_a_command_whose_output_is_left_ends_quietly(start_module, folder):
    process = start_module("recyc_jax", "The grass", "--model", folder, "--max-new-tokens", "200")
    process.stdout.close()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 141
    assert "Traceback" not in said


def test_a_prompt_that_is_too_long_ends_in_one_line(call_module, folder):
    ran = call_module("recyc_jax", "green " * 20000, "--model", folder, "--max-new-tokens", "4")
    assert ran.returncode == 2
    assert len(ran.stderr.strip().splitlines()) == 1
    assert ran.stderr.startswith("error: ")


def test_the_command_converses(call_module, folder, tmp_path, monkeypatch):
    kept = tmp_path / "a talk"
    lines = ["What is green?", "/stats", "/policy nonsense", "/policy full", f"/save {kept}", "/save", "Why?", "/reset"]
    lines += ["/what", "", f"/load {kept}", "/load /no/such/folder", "Why?", "/quit"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    ran = call_module("recyc_jax", "--chat", "--model", folder, "--max-new-tokens", 6)
    assert ran.returncode == 0, ran.stderr
    assert "'nonsense' is unknown" in ran.stdout
    answers = [line.removeprefix("> ") for line in ran.stdout.splitlines()]
    assert "saved: 2 messages" in ran.stdout
    assert "loaded: 2 messages" in ran.stdout
    assert "/save needs what to save" in ran.stdout
    assert "no/such/folder/card.json is not there" in ran.stdout
    assert answers[-2] in answers[:-2]  # the answer to "Why?" after loading is the one from before
    last = ran.stderr.splitlines()[-1]
    assert "full" in last
    assert "GiB at most" in last


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "pass a prompt"),
        (["x", "--policy", "nonsense"], "'nonsense' is unknown"),
        (["x", "--file", "/no/such/file"], "--file /no/such/file: No such file"),
        (["x", "--top-p", "0.5"], "pass --temperature"),
        (["x", "--max-new-tokens", "0"], "max-new-tokens"),
        (["x", "--temperature", "-1"], "temperature"),
    ],
)
def test_bad_flags_end_in_one_line(call_module, flags, message):
    ran = call_module("recyc_jax", *flags)
    assert ran.returncode != 0
    assert message in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1
