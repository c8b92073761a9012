"""RULER's generators: exact wording, placement, sizing and determinism."""

import itertools
import re
import uuid
from collections import Counter

import pytest

from eval.ruler import material as texts
from eval.ruler.tasks import cwe, fwe, long_answers, niah, qa, vt
from eval.ruler.tasks.base import Essays, Material, Prompting
from eval.ruler.tasks.registry import LONG_TASKS, TASKS

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
PLAIN = Prompting(lambda body: body, lambda texts: [len(re.findall(r"\w+|[^\w ]", text)) for text in texts])


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
    if name in LONG_TASKS:
        length += 1000  # their answers take 832 tokens
    task = build(name, length)
    samples = [task.sample(index) for index in range(6)]
    for index, sample in enumerate(samples):
        assert sample.index == index
        assert sample.length == PLAIN.count(sample.prompt) + task.new_tokens
        assert sample.length <= length
    if not name.startswith("qa"):  # the corpus of this test is too small
        assert max(sample.length for sample in samples) > 0.75 * length
        # a sample that is one token too long shrinks by a step: 500 essay words from 4096 tokens on, few words below
        assert min(sample.length for sample in samples) > (0.7 if length >= 4096 else 0.75) * length
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
    """For such lengths, the reference loops forever."""
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
        if kind.num_queries > 1:
            assert list(sample.outputs) == [row[0] for row in values]  # in the order of the question
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
        # the text ends in mid-sentence, and a needle may come at its end
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
    assert others[0] != others[1]  # every sample draws its own names for the example


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
    # unanswerable questions are skipped: the third answerable question is that of the fourth paragraph
    assert material.squad.questions[2].text == "What is 0-3?"
    assert material.squad.questions[2].answers == ("thing 3", "a thing")


def test_qa_runs_out_of_questions(build):
    with pytest.raises(ValueError, match="qa_2 has 30 questions"):
        build("qa_2").sample(30)


def test_chat_templates_wrap_the_body_and_the_prefix_comes_after(build):
    chat = Prompting(lambda body: f"<user>{body}<assistant>", PLAIN.counts)
    for name in TASKS:
        plain, wrapped = build(name), build(name, prompting=chat)
        sample = wrapped.sample(0)
        assert sample.input.startswith("<user>")
        assert sample.input.endswith("<assistant>")
        assert sample.prompt == sample.input + sample.answer_prefix
        assert sample.length <= 2048
        assert plain.new_tokens == wrapped.new_tokens


def test_whole_prompts_to_the_letter(build):
    """The prompts here were typed from the description of the reference, not copied from the generators."""
    sample = build("niah_single_1").sample(0)
    key = re.search(r"What is the special magic number for (.*) mentioned", sample.input)[1]
    lines = sample.prompt.split("\n")
    assert lines[0] == (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the "
        "number afterwards."
    )
    assert set(lines[1:-1]) == {
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.",
        f"One of the special magic numbers for {key} is: {sample.outputs[0]}.",
    }
    assert lines[-1] == (
        f"What is the special magic number for {key} mentioned in the provided text? The special magic number for {key} "
        "mentioned in the provided text is"
    )
    sample = build("niah_multiquery").sample(0)
    keys = re.search(r"What are all the special magic numbers for (.*) mentioned in the provided text\?", sample.input)[
        1
    ]
    assert sample.prompt.startswith(
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the numbers afterwards.\n"
    )
    assert sample.prompt.endswith(
        f"\nWhat are all the special magic numbers for {keys} mentioned in the provided text? The special magic numbers "
        f"for {keys} mentioned in the provided text are"
    )
    vt_lines = build("vt").sample(0).prompt.split("\n")
    value = re.search(r"value (\d+) in", vt_lines[-1])[1]
    assert vt_lines[0] == ("Memorize and track the chain(s) of variable assignment hidden in the following text.")
    assert vt_lines[1] == ""
    assert vt_lines[-1] == (
        f"Question: Find all variables that are assigned the value {value} in the text above. Answer: According to the "
        f"chain(s) of variable assignment in the text above, 5 variables are assigned the value {value}, they are: "
    )
    other = [line for line in vt_lines[2:-1] if not line.startswith(("VAR ", "Question: ", "Memorize ")) and line]
    assert set(other) == {"The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."}
    cwe_lines = build("cwe").sample(0).prompt.split("\n")
    assert (
        cwe_lines[0]
        == cwe_lines[3]
        == (
            "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
            "appear most often."
        )
    )
    assert cwe_lines[5] == (
        "Question: What are the 10 most common words in the above list? Answer: The top 10 words that appear most often "
        "in the list are:"
    )
    assert cwe_lines[2].startswith(f"{cwe_lines[5]} 1. ")
    fwe_lines = build("fwe").sample(0).prompt.split("\n")
    assert re.sub(r"(\.\.\.|[a-z]{6})( (\.\.\.|[a-z]{6}))+$", "#", fwe_lines[0]) == (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
        "coded words. #"
    )
    assert fwe_lines[1] == (
        "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
        "appeared words in the above coded text? Answer: According to the coded text above, the three most frequently "
        "appeared words are:"
    )
    qa_prompt = build("qa_1").sample(0).prompt
    ask = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    assert qa_prompt.startswith(f"{ask}\n\nThe following are given documents.\n\nDocument 1:\nParagraph ")
    assert qa_prompt.endswith(f".\n\n{ask}\n\nQuestion: What is 0-0? Answer:")


def test_multivalues_are_shuffled_alike_in_every_sample(build):
    orders = set()
    for index in range(8):
        sample = build("niah_multivalue").sample(index)
        orders.add(tuple(sorted(range(4), key=lambda at: sample.input.index(sample.outputs[at]))))
    assert len(orders) == 1


def test_a_path_follows_the_roads(build):
    for index in range(5):
        sample = build("long_path").sample(index)
        roads = re.findall(r"From (\S+) the road goes to (\S+)\.", sample.input)
        goes = dict(roads)
        assert len(goes) == len(roads) == len(set(goes.values()))  # one road from each place, and one to each
        here = re.fullmatch(r" Answer: From (\S+) the road goes to", sample.answer_prefix)[1]
        assert f"Start at {here} and follow the roads for {len(sample.outputs)} steps." in sample.input
        for there in sample.outputs:
            here = goes[here]
            assert here == there


def test_records_are_asked_for_in_reverse(build):
    for index in range(5):
        sample = build("long_reverse").sample(index)
        records = dict(re.findall(r"Record (\d+): \S+ (\d{7})\.", sample.input))
        last, first = map(int, re.search(r"from number (\d+) down to number (\d+),", sample.input).groups())
        assert sample.answer_prefix == f" Answer: Record {last}:"
        assert sample.outputs == tuple(records[str(number)] for number in range(last, first - 1, -1))
        assert len(sample.outputs) == long_answers.ITEMS


def test_needles_are_asked_for_in_the_order_of_the_question(build):
    sample = build("long_needles", 4096).sample(0)
    needles = dict(re.findall(r"One of the special magic numbers for (\S+) is: (\d{7})\.", sample.input))
    asked = re.search(r"numbers for (.*) mentioned in the provided text\?", sample.input)[1]
    keys = asked.replace(", and ", ", ").split(", ")
    assert [needles[key] for key in keys] == list(sample.outputs)
    assert len(keys) == 32
    assert sample.answer_prefix.endswith(f"One of the special magic numbers for {keys[0]} is:")
