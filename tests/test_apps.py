"""Program synthesis: the loader, the program in a response, the reward, and the twin."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from marlhf.config import DataConfig
from marlhf.sandbox import Sandbox, SandboxError, Verdict
from marlhf.tasks import apps, get_task
from marlhf.tasks import apps_twin as twin
from marlhf.text import DataError, decode, encode_response, load_tokenizer, train_tokenizer

HOME = Path(__file__).parents[1]
SHARED = HOME / "../shared/data"
real = pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
INDENTED = "def f(xs):\n    for x in xs:\n        if x > 3:\n\n            return x\n\treturn  0"


def row(i, **more):
    tests = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]}
    return {
        "problem_id": i,
        "question": f"Add two numbers, as problem {i} says.",
        "solutions": json.dumps(["\n\nprint(sum(map(int, input().split())))\n", "pass"]),
        "input_output": json.dumps(tests),
        "difficulty": "interview",
        "url": "",
        "starter_code": "",
    } | more


def load(tmp_path, rows, **settings):
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    data = DataConfig(task="apps", source=str(path), split=[0.5, 0.0, 0.5], valid=2, **settings)
    return get_task("apps").load(data)


@pytest.fixture(scope="module")
def embedded():
    data = DataConfig(task="apps", size=600, split=[0.2, 0.0, 0.8], valid=60)
    return get_task("apps").load(data)


# ---------------------------------------------------------------- rows


def test_prompt_and_first_solution(tmp_path):
    call = json.dumps({"fn_name": "f", "inputs": [[1]], "outputs": [[2]]})
    rows = [row(i) for i in range(8)] + [row(8, input_output=call, starter_code="\ndef f(x):\n")]
    data = load(tmp_path, rows)
    found = {e.id: e for e in (*data.sft, *data.ppo, *data.valid)}
    assert found["0"].prompt.text == (
        "QUESTION:\nAdd two numbers, as problem 0 says.\nUse Standard Input format\nANSWER:\n"
    )
    assert found["0"].response == "print(sum(map(int, input().split())))"
    assert found["8"].prompt.suffix == "\ndef f(x):\nUse Call-Based format\nANSWER:\n"
    assert get_task("apps").labels(found["0"]) == {"difficulty": "interview"}


@pytest.mark.parametrize(
    "tests, reason",
    [
        ("", "no tests"),
        ('{"inputs": [], "outputs": []}', "no tests"),
        ('{"inputs": ["1"', "broken tests"),
        ("[" * 100_000, "broken tests"),
        ('{"inputs": ["1"], "outputs": []}', "broken tests"),
        ('{"inputs": [3], "outputs": [3], "fn_name": "f"}', "broken tests"),
        ('{"inputs": [[1]], "outputs": [' + "9" * 5000 + '], "fn_name": "f"}', "thousands of dig"),
        ('{"inputs": ["' + "1 " * 2**20 + '"], "outputs": ["1"]}', "more than a megabyte"),
    ],
    ids=range(8),
)
def test_what_cannot_be_used_is_counted_and_never_fatal(tmp_path, tests, reason):
    data = load(tmp_path, [row(i) for i in range(8)] + [row(9, input_output=tests)])
    assert len(data.dropped) == 1 and reason in next(iter(data.dropped))
    assert len(data.sft) + len(data.ppo) + len(data.valid) == 8


def test_broken_solutions_leave_a_prompt(tmp_path):
    assert apps.first_solution("[broken") == apps.first_solution("[]") == ""
    assert apps.first_solution('["\\n    x = 1\\n"]') == "    x = 1"
    data = load(tmp_path, [row(i, solutions="") for i in range(9)])
    assert data.sft == [] and data.dropped["no demonstration"] == 4


def test_other_tests_are_other_data(tmp_path):
    rows = [row(i) for i in range(9)]
    other = json.dumps({"inputs": ["1\n"], "outputs": ["1\n"]})
    before = load(tmp_path, rows).fingerprint
    assert load(tmp_path, rows[:-1] + [row(8, input_output=other)]).fingerprint != before


# ---------------------------------------------------------------- program and reward


@pytest.mark.parametrize(
    "response, program",
    [
        ("print(1)", "print(1)"),
        ("    x = 1\n\n", "    x = 1\n\n"),
        ("Here it is:\n```python\n  x = 1\ny\n```\nDone.", "  x = 1\ny\n"),
        ("```\nx = 1\n", "x = 1\n"),
        ("x = 1\n```\n", "x = 1\n"),
        ("x = 1\nQUESTION:\nAnother", "x = 1\n"),
        ("", ""),
    ],
)
def test_the_program_in_a_response(response, program):
    assert apps.program_of(response) == program


def test_spaces_and_line_breaks_survive_the_tokenizers():
    names = [SHARED / "models/stories260K"] if SHARED.exists() else []
    tokenizers = [train_tokenizer([INDENTED] * 3, 270), *map(load_tokenizer, names)]
    for tokenizer in tokenizers:
        for text in (INDENTED, "    " + INDENTED, "\n\n  x", "x\n"):
            assert decode(encode_response(text, tokenizer, 400), tokenizer) == text


@pytest.mark.parametrize(
    "results, expected",
    [
        (["passed"] * 3, 1.0),
        (["passed", "wrong", "wrong"], -0.3 + 1.3 / 3),
        (["wrong"], -0.3),
        (["passed", "passed", "runtime error"], -0.6),
        (["passed", "time-out"], -0.6),
        (["killed"], -0.6),
    ],
)
def test_the_reward_of_appendix_b5(results, expected):
    assert apps.reward(Verdict(True, tuple(results))) == pytest.approx(expected)
    assert apps.reward(Verdict(False, ("compile error",) * 3)) == -1.0


def test_programs_are_run(tmp_path):
    data = load(tmp_path, [row(i) for i in range(9)], allow_unsafe_programs=True)
    example = data.ppo[0]
    programs = [
        (example.response, 1.0),
        (f"```python\n{example.response}\n```", 1.0),
        ("print(3)", -0.3 + 1.3 / 2),
        ("print(input())", -0.3),
        ("print(1 / 0)", -0.6),
        ("print(", -1.0),
    ]
    scores = get_task("apps").true_scores(
        [example] * len(programs), [p for p, _ in programs], [True] * len(programs)
    )
    assert scores == pytest.approx([score for _, score in programs])


def test_a_program_is_run_once(embedded, monkeypatch):
    task = apps.Apps()
    example = embedded.ppo[0]
    task.true_score(example, "print(1)", True)
    monkeypatch.setattr(Sandbox, "run", lambda self, programs: pytest.fail("was run again"))
    assert task.true_score(example, "print(1)", False) < 1


def test_rows_from_outside_do_not_run_where_nothing_isolates(tmp_path, monkeypatch, embedded):
    def only_limits(limits, trusted):
        if not trusted:
            raise SandboxError("only limits")
        return Sandbox(limits=limits, trusted=True, isolation="limits", workers=1)

    monkeypatch.setattr(apps, "Sandbox", only_limits)
    rows = [row(i, **{apps.TRUSTED: True}) for i in range(9)]  # a row cannot trust itself
    outside = load(tmp_path, rows)
    task = apps.Apps()
    with pytest.raises(DataError, match=r"data\.allow_unsafe_programs=true"):
        task.true_score(outside.ppo[0], "print(1)", True)
    with pytest.raises(DataError, match="only limits"):
        task.facts(DataConfig(task="apps", source="hub"))
    assert task.facts(DataConfig(task="apps")) == {"isolation": "limits"}
    assert task.true_score(embedded.ppo[0], "print(1)", True) < 1
    allowed = load(tmp_path, rows, allow_unsafe_programs=True)
    assert task.true_score(allowed.ppo[0], allowed.ppo[0].response or "print(3)", True) > -0.6


# ---------------------------------------------------------------- the twin


PROBLEMS = [twin.row(7, number) for number in range(400)]


def test_the_twin_is_deterministic_and_grows():
    assert twin.rows(5, 7) == [made for made, _ in PROBLEMS[:5]]
    assert set(PROBLEMS[0][0]) == set(row(0))


def test_right_programs_pass_their_tests():
    """Real Python: every form, level and operator, in the sandbox."""
    task = get_task("apps")
    data = DataConfig(task="apps", size=120, seed=7, split=[0.0001, 0.0, 0.9999], valid=1)
    examples = task.load(data).ppo
    right = [twin.write(PROBLEMS[int(e.id.split("-")[-1])][1]) for e in examples]
    assert task.true_scores(examples, right, [True] * len(right)) == [1.0] * len(right)
    slips = [twin.write(PROBLEMS[int(e.id.split("-")[-1])][1], "colon") for e in examples[:20]]
    assert min(task.true_scores(examples[:20], slips, [True] * 20)) == -1.0


def test_no_constant_and_no_echo_solves_a_problem():
    for made, problem in PROBLEMS:
        checks = json.loads(made["input_output"])
        assert len(checks["inputs"]) == len(checks["outputs"]) >= 3
        answers = [str(output) for output in checks["outputs"]]
        assert len(set(answers)) == len(answers)  # a constant passes one test at most
        for given, output in zip(checks["inputs"], checks["outputs"], strict=True):
            numbers = given[0] if problem.form == "call" else [int(x) for x in given.split()]
            assert int(output[0] if problem.form == "call" else output) not in numbers


def test_wrong_programs_are_found_out():
    """A misread problem fails its tests nearly always: they are rich in the values that matter."""
    rng, seen = random.Random(0), Counter()
    for made, problem in PROBLEMS:
        wrong = twin.misread(rng, problem)
        given = [
            i[0] if problem.form == "call" else [int(x) for x in i.split()]
            for i in json.loads(made["input_output"])["inputs"]
        ]
        given = [numbers[problem.form == "lines" :] for numbers in given]
        if wrong != problem:
            same = all(twin.answer(wrong, n) == twin.answer(problem, n) for n in given)
            seen["missed" if same else "found"] += 1
    assert seen["found"] > 5 * seen["missed"]


def test_levels_forms_and_headroom():
    levels = Counter(problem.level for _, problem in PROBLEMS)
    assert set(levels) == set(twin.LEVELS) and min(levels.values()) > 70
    assert {problem.form for _, problem in PROBLEMS} == set(twin.FORMS)
    right = [json.loads(made["solutions"])[0] == twin.write(problem) for made, problem in PROBLEMS]
    assert 0.25 < sum(right) / len(right) < 0.6  # demonstrations err


def test_lengths_fit_the_preset(embedded):
    texts = [text for e in embedded.sft for text in (e.prompt.text, e.response)]
    tokenizer = train_tokenizer(texts, 600)
    longest = max(len(encode_response(e.response, tokenizer, 400)) for e in embedded.sft)
    assert longest <= 72
    assert max(len(tokenizer(e.prompt.text).input_ids) for e in embedded.ppo) <= 80


# ---------------------------------------------------------------- real rows


@real
def test_all_real_problems_load_and_their_solutions_run():
    data = DataConfig(
        task="apps", source=str(SHARED / "apps"), split=[0.2, 0.0, 0.8], valid=10,
        allow_unsafe_programs=True,
    )  # fmt: skip
    task = get_task("apps")
    found = task.load(data)
    examples = [*found.sft, *found.ppo, *found.valid]
    assert len(examples) == 150 and found.dropped == {}
    scores = task.true_scores(examples, [e.response for e in examples], [True] * 150)
    assert sum(score == 1.0 for score in scores) >= 128
