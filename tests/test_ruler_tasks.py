"""RULER's generators: exact wording, placement, sizing and determinism."""

import itertools
import re
import uuid
from collections import Counter

import pytest

from eval import texts
from eval.tasks import cwe, fwe, niah, qa, vt
from eval.tasks.base import Essays, Material, Prompting
from eval.tasks.registry import TASKS

SENTENCES = [f"Sentence number {number} says nothing of note to anyone at all." for number in range(700)]
ESSAYS = Essays(tuple(" ".join(SENTENCES).split()), lambda text: re.findall(r"[^.]+\.?", text.replace(". ", ".")))
SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": f"Paragraph {article}-{number} is about things.",
                    "qas": [
                        {
                            "question": f"What is {article}-{number}?",
                            "is_impossible": number == 2,
                            "answers": [{"text": f"thing {number}"}, {"text": "a thing"}] * (number != 2),
                        }
                    ],
                }
                for number in range(4)
            ]
        }
        for article in range(60)
    ]
}
HOTPOT = [
    {
        "question": f"Which is {row}?",
        "answer": f"answer {row}",
        "context": [[f"Title {row}-{at}", [f"First of {row}-{at}.", " Second."]] for at in range(10)],
    }
    for row in range(30)
]
PLAIN = Prompting(lambda body: body, lambda text: len(re.findall(r"\w+|[^\w ]", text)))


@pytest.fixture(scope="module")
def material():
    return Material(texts.words(), ESSAYS, qa.read_squad(SQUAD), qa.read_hotpot(HOTPOT))


@pytest.fixture
def build(material):
    def make(name, length=2048, seed=42, prompting=PLAIN):
        return TASKS[name](name, material, prompting, length, seed)

    return make


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [1500, 4096])
def test_samples_fit_and_fill(build, name, length):
    task = build(name, length)
    samples = [task.sample(index) for index in range(6)]
    for index, sample in enumerate(samples):
        assert sample.index == index
        assert sample.length == PLAIN.count(sample.prompt) + task.new_tokens
        assert sample.length <= length
    if not name.startswith("qa"):  # the test's corpus is small
        assert max(sample.length for sample in samples) > 0.75 * length
    assert len({sample.prompt for sample in samples}) == 6


@pytest.mark.parametrize("name", TASKS)
def test_a_sample_depends_on_seed_task_length_and_index_alone(build, name):
    alone = build(name).sample(4)
    among = [build(name).sample(index) for index in range(6)][4]
    assert alone == among
    assert alone != build(name, seed=43).sample(4)
    assert alone.input != build(name, length=3000).sample(4).input


@pytest.mark.parametrize("name", TASKS)
def test_a_length_below_the_minimum_is_named(build, name):
    with pytest.raises(ValueError, match=f"length 60 is below the minimum of {name}: its smallest sample takes"):
        build(name, 60).sample(0)


@pytest.mark.parametrize("name", TASKS)
def test_a_tight_length_still_makes_samples(build, name):
    """Where the reference loops forever."""
    try:
        build(name, 60).sample(0)
    except ValueError as error:
        least = int(re.search(r"takes (\d+) tokens", str(error))[1])
    task = build(name, least + 40)
    assert all(task.sample(index).length <= least + 40 for index in range(5))


@pytest.mark.parametrize("name", niah.KINDS)
def test_niah(build, name):
    kind = niah.KINDS[name]
    for index in range(5):
        sample = build(name).sample(index)
        many = kind.num_values * kind.num_queries > 1
        thing = kind.values if many else kind.values[:-1]
        assert sample.input.startswith(
            f"Some special magic {thing} are hidden within the following text. Make sure to memorize it. I will quiz you "
            f"about the {thing} afterwards.\n"
            if many
            else f"A special magic {thing} is hidden within the following text. Make sure to memorize it. I will quiz you "
            f"about the {thing} afterwards.\n"
        )
        context, question = sample.input.split("afterwards.\n", 1)[1].rsplit("\n", 1)
        needles = re.findall(rf"One of the special magic {kind.values} for (.+?) is: ([\w-]+)\.", context)
        if kind.haystack != "needle":
            assert len(needles) == kind.num_keys * kind.num_values
        else:
            assert len(needles) > 3
        asked = re.search(rf"special magic {thing} for (.*) mentioned in the provided text\?$", question)[1]
        are, number = ("are", "all the ") if many else ("is", "the ")
        assert question == f"What {are} {number}special magic {thing} for {asked} mentioned in the provided text?"
        assert sample.answer_prefix == f" The special magic {thing} for {asked} mentioned in the provided text {are}"
        keys = asked.replace(", and ", ", ").split(", ")
        assert len(keys) == kind.num_queries
        values = [[value for key, value in needles if key == wanted] for wanted in keys]
        assert sorted(sample.outputs) == sorted(value for row in values for value in row)
        assert list(sample.outputs[:: kind.num_values]) or not many
        if kind.num_queries > 1:
            assert list(sample.outputs) == [row[0] for row in values]  # in the order asked
        for value in sample.outputs:
            if kind.values == "numbers":
                assert 1000000 <= int(value) <= 9999999
            else:
                assert uuid.UUID(value).version == 4
        for key, _ in needles:
            assert uuid.UUID(key).version == 4 if kind.keys == "uuids" else "-" in key
        if kind.haystack == "noise":
            assert set(context.split("\n")) - {niah.NOISE} == {
                f"One of the special magic numbers for {k} is: {v}." for k, v in needles
            }
        if kind.haystack == "needle":
            assert all(line.startswith("One of the special") for line in context.split("\n"))


def test_niah_needles_stand_between_sentences_at_distinct_depths(build):
    seen = Counter()
    for index in range(30):
        context = build("niah_multikey_1").sample(index).input.split("\n")[1]
        *before, after = re.split(r"One of the special magic numbers[^.]*\.", context)
        before = [piece.rstrip() for piece in before]
        # the text ends in mid-sentence, and a needle may stand at its very end
        assert all(piece == "" or piece.endswith(".") for piece in before[: None if after.strip() else -1])
        seen[sum(map(len, before[:1])) * 10 // len(context)] += 1
    assert len(seen) > 3  # spread over the text


def test_vt(build):
    for index in range(5):
        sample = build("vt").sample(index)
        example, real = sample.input.split("\n\nMemorize", 1)
        real = "Memorize" + real
        for text, letters in ((example, 3), (real, 5)):
            value = re.search(r"that are assigned the value (\d{5}) in the text above\.", text)[1]
            statements = re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)( ?)$", text, re.M)
            assert [len(name) for name, _, _ in statements] == [letters] * 5
            assert statements[0][1:] == (value, "")
            for (before, _, _), (_, source, space) in itertools.pairwise(statements):
                assert (source, space) == (before, " ")
        names = [name for name, _, _ in statements]
        assert list(sample.outputs) == names
        assert sample.answer_prefix == vt.ANSWER_PREFIX.format(count=5, query=value)
        shown = re.search(r"they are:  ((?:[A-Z]{3} ?){5})$", example)[1].split()
        assert len(shown) == 5
        assert f"VAR {shown[0]} = " in example
        assert PLAIN.count(example) <= 500
    others = [build("vt").sample(index).input.split("\n\nMemorize", 1)[0] for index in range(2)]
    assert others[0] != others[1]  # the example's names are drawn for every sample


@pytest.mark.parametrize(("length", "often", "rarely"), [(2048, 6, 1), (4096, 30, 3)])
def test_cwe(build, length, often, rarely):
    sample = build("cwe", length).sample(1)
    example, real = sample.input.split("\nBelow is a numbered list", 1)
    counts = Counter(re.findall(r"\d+\. ([^\d]+?)(?= \d+\.|\nQuestion)", real))
    common = [word for word, count in counts.items() if count == often]
    assert sorted(common) == sorted(sample.outputs)
    assert set(counts.values()) == {often, rarely}
    assert example.startswith("Below is a numbered list of words.")
    shown = re.search(re.escape(cwe.ANSWER_PREFIX) + r" (1\. .* 10\. .*)$", example)[1]
    example_counts = Counter(re.findall(r"\d+\. ([^\d]+?)(?= \d+\.|\nQuestion)", example))
    top = {word for word, _ in example_counts.most_common(10)}
    assert {part.split(". ", 1)[1] for part in re.split(r" (?=\d+\. )", shown)} == top
    assert sample.answer_prefix == " Answer: The top 10 words that appear most often in the list are:"


def test_cwe_at_64k_has_words_enough(build):
    assert 4000 < build("cwe", 65536).size < 8166


def test_cwe_names_what_it_lacks(build):
    with pytest.raises(ValueError, match="cwe at length 1000000 needs more distinct words than"):
        build("cwe", 10**6).sample(0)


def test_fwe(build):
    sample = build("fwe", 4096).sample(2)
    coded = sample.input.split("coded words. ", 1)[1].split("\nQuestion", 1)[0].split(" ")
    ranking = [word for word, _ in Counter(coded).most_common(4)]
    assert ranking == ["...", *sample.outputs]
    assert all(re.fullmatch("[a-z]{6}", word) for word in set(coded) - {"..."})
    assert 0.5 < coded.count("...") / len(coded) < 0.72
    assert "Please ignore the dots '....'. What are the three" in sample.input
    assert sample.answer_prefix == fwe.ANSWER_PREFIX


def test_qa(build, material):
    for name, gold, index in (("qa_1", 1, 2), ("qa_2", 10, 3)):
        sample = build(name).sample(index)
        question = (material.squad if name == "qa_1" else material.hotpot).questions[index]
        assert f"\n\nQuestion: {question.text}" in sample.input
        assert sample.outputs == question.answers
        documents = re.findall(r"Document (\d+):\n(.+?)(?=\n\n)", sample.input, re.S)
        assert [int(number) for number, _ in documents] == list(range(1, len(documents) + 1))
        found = {text for _, text in documents}
        wanted = (
            {material.squad.documents[at] for at in question.gold}
            if gold == 1
            else {material.hotpot.documents[at] for at in question.gold}
        )
        assert wanted <= found
        assert len(wanted) == gold
        assert sample.answer_prefix == " Answer:"
    # unanswerable questions are passed over: the third answerable one is the fourth paragraph's
    assert material.squad.questions[2].text == "What is 0-3?"
    assert material.squad.questions[2].answers == ("thing 3", "a thing")


def test_qa_runs_out_of_questions(build):
    with pytest.raises(ValueError, match="qa_2 has 30 questions"):
        build("qa_2").sample(30)


def test_chat_templates_wrap_the_body_and_the_prefix_comes_after(build):
    chat = Prompting(lambda body: f"<user>{body}<assistant>", PLAIN.count)
    for name in TASKS:
        plain, wrapped = build(name), build(name, prompting=chat)
        sample = wrapped.sample(0)
        assert sample.input.startswith("<user>")
        assert sample.input.endswith("<assistant>")
        assert sample.prompt == sample.input + sample.answer_prefix
        assert sample.length <= 2048
        assert plain.new_tokens == wrapped.new_tokens
