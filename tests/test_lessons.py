"""Lessons: every exercise fails as shipped and passes with its folded solution, both read from the
notebooks themselves; hints name what is wrong; stored notebooks are clean; sliders redraw.

A lesson marks an exercise's cell with the tag `exercise`, whose last line is the check, and the
markdown cell with the solution, the next one so tagged, with `solution`."""

import ast
import math
import re
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from marlhf import chain, drawings, lessons
from marlhf.chain import Estimator
from marlhf.macro import macro_gae
from marlhf.segment import from_starts

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
LESSONS = sorted(FOLDER.glob("lesson*.ipynb"))


def cells(path, kind="code", tag=None):
    found = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == kind]
    return [c for c in found if tag is None or tag in c.metadata.get("tags", [])]


def exercises():
    for path in LESSONS:
        tasks, answers = cells(path, tag="exercise"), cells(path, "markdown", "solution")
        assert len(tasks) == len(answers), f"{path.stem}: an exercise lacks its solution"
        for number, (task, answer) in enumerate(zip(tasks, answers, strict=True), 1):
            yield pytest.param(path, task.source, answer.source, id=f"{path.stem}-{number}")


def imports(path):
    """The names that a lesson imports, as its exercises see them."""
    space = {}
    for cell in cells(path):
        lines = ast.parse(cell.source).body
        kept = [line for line in lines if isinstance(line, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(kept, []), path.name, "exec"), space)
    return space


def attempt(task, space):
    """Run an exercise's cell; the value of its last line, the verdict."""
    *work, check = ast.parse(task).body
    exec(compile(ast.Module(work, []), "exercise", "exec"), space)
    return eval(compile(ast.Expression(check.value), "check", "eval"), space)


# Exercises


@pytest.mark.parametrize("path, task, answer", list(exercises()))
def test_exercise_fails_as_shipped_and_passes_when_solved(path, task, answer):
    space = imports(path)
    verdict = attempt(task, space)
    assert not verdict
    assert repr(verdict).startswith("Not yet. ")
    (solution,) = re.findall(r"```python\n(.*?)```", answer, flags=re.S)
    assert answer.startswith("<details>")
    assert solution.strip() not in repr(verdict)  # a hint, not the answer
    exec(solution, space)
    check = ast.parse(task).body[-1]
    solved = eval(compile(ast.Expression(check.value), "check", "eval"), space)
    assert solved
    assert repr(solved).startswith("Solved. ")


def test_an_error_in_the_readers_function_is_a_verdict():
    verdict = lessons.check_matched_lambda(lambda lam, n: lam / 0)
    assert not verdict
    assert repr(verdict) == "Not yet. It raised ZeroDivisionError: float division by zero"
    assert not lessons.check_spread(lambda y, segments: None)


def test_hints_follow_the_mistake():
    assert "5 token steps at your λ keep 0.774" in repr(
        lessons.check_matched_lambda(lambda x, n: x)
    )
    assert "'unit'" in repr(
        lessons.check_credit_shares(lambda n, w: _equal_for_all_but_first(n, w))
    )
    assert "4 tokens, please" in repr(lessons.check_credit_shares(_three_always))
    assert "sum to one" in repr(lessons.check_decay(lambda v: sum(v) if len(v) == 4 else _decay(v)))
    assert "length = 3" in repr(lessons.check_delta(lambda r, v, w, k, g: r + g * w - v))
    assert "padding" in repr(lessons.check_spread(lambda y, s: y.gather(1, s.clamp(min=0))))
    assert "[2, 6]" in repr(lessons.check_spread(lambda y, s: y))


def _three_always(n, weights):
    return [1.0] * 3


def _equal_for_all_but_first(n, weights):
    return [1.0] * n if weights == "first" else [(i + 1) / n for i in range(n)]


def _decay(values):
    raw = [1 / (len(values) - i) for i in range(len(values))]
    return sum(w * v for w, v in zip(raw, values, strict=True)) / sum(raw)


def test_unbiased_takes_either_mend_and_no_shortcut():
    def first(r, v, s, lam):
        return macro_gae(r, v, s, 1.0, lam, "first")[0]

    def tokens(r, v, s, lam):  # unbiased, but no macro actions
        return macro_gae(r, v, torch.arange(8).expand_as(s), 1.0, lam)[0]

    def no_baseline(r, v, s, lam):
        return macro_gae(r, v, s, 1.0, lam)[1]

    assert lessons.check_unbiased(first)
    assert "Keep the macro actions" in repr(lessons.check_unbiased(tokens))
    assert "Keep the macro actions" in repr(lessons.check_unbiased(no_baseline))


def test_hints_of_lesson_2():
    def global_mean(losses):
        return [t == 0 or losses[t] > sum(losses[:t]) / t for t in range(len(losses))]

    assert "a past of its own" in repr(lessons.check_starts(global_mean))
    assert "whatever its loss" in repr(lessons.check_starts(lambda x: [False] * len(x)))
    assert "2 losses gave 1 answers" in repr(lessons.check_starts(lambda x: [True]))

    def no_padding(begins, mask, n):
        return (begins.cumsum(1) - 1) // n

    assert "padding needs -1" in repr(lessons.check_words(no_padding))
    assert "n = 2" in repr(lessons.check_words(lambda b, m, n: from_starts(b, m)))
    assert "One share" in repr(lessons.check_reach(lambda segments, lam: lam))


def test_hints_of_lesson_4():
    def last_of_the_batch(scores, kl, mask, kl_coef):
        found = -kl_coef * kl
        found[torch.arange(3), mask.sum(1) - 1] += scores
        return found  # the place is right, the padding is not 0

    assert "with padding to" in repr(lessons.check_rewards(last_of_the_batch))
    assert "[3, 5]" in repr(lessons.check_rewards(lambda scores, *_: scores))

    def clipped(new, old, a, clip):
        ratio = (new - old).exp()
        return torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a)

    def row_means(new, old, a, mask, clip):
        return -((clipped(new, old, a, clip) * mask).sum(1) / mask.sum(1)).mean()

    def sum_of_all(new, old, a, mask, clip):
        return -clipped(new, old, a, clip).sum() / mask.sum()

    assert "short response" in repr(lessons.check_policy_loss(row_means))
    assert "mask alone" in repr(lessons.check_policy_loss(sum_of_all))
    assert "not PPO's loss" in repr(lessons.check_policy_loss(lambda n, o, a, m, c: (n * a).sum()))

    def two_early(outputs, starts, length):
        return outputs.gather(1, (starts[:, None] - 2 + torch.arange(length)).clamp(min=0))

    assert "should have seen it" in repr(lessons.check_values(two_early))
    assert "[2, 5]" in repr(lessons.check_values(lambda outputs, starts, length: outputs))


# Stored notebooks


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_lessons_are_stored_executed_and_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    assert len(cells(path, tag="parameters")) == 1
    for number, cell in enumerate(cells(path), 1):
        assert cell.execution_count == number
        assert set(cell.metadata) <= {"tags"}
        assert len(cell.source.splitlines()) <= 40
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})
            assert str(FOLDER.parent) not in str(output)
            assert "application/vnd" not in str(output.get("data", {}).keys())
    for cell in cells(path, tag="parameters"):
        for line in ast.parse(cell.source).body:
            ast.literal_eval(line.value)


def test_store_cleans_a_notebook():
    sys.path.insert(0, str(FOLDER))
    try:
        from store import SLIDERS, clean
    finally:
        sys.path.remove(str(FOLDER))
    v4 = nbformat.v4
    view = v4.new_output("display_data", data={SLIDERS: {"model_id": "1"}, "text/plain": "VBox()"})
    picture = v4.new_output("display_data", data={"text/plain": "a picture"})
    cell = v4.new_code_cell("1", outputs=[picture, view], metadata={"tags": ["x"], "execution": {}})
    notebook = v4.new_notebook(cells=[cell], metadata={"widgets": {}, "papermill": {}})
    clean(notebook)
    assert notebook.cells[0].outputs == [picture]
    assert notebook.cells[0].metadata == {"tags": ["x"]}
    assert set(notebook.metadata) == {"kernelspec", "language_info"}


# Pictures and sliders


def test_drawings_are_pngs_with_their_alternative_text():
    drawing = drawings.ladder(
        torch.tensor([0.0, 1.0]), torch.tensor([0.2, 0.4]), torch.tensor([0, 0]), 1.0, 0.95
    )
    data, metadata = drawing._repr_mimebundle_()
    assert drawing.png().startswith(b"\x89PNG")
    assert data["text/plain"] == repr(drawing) == metadata["image/png"]["alt"]
    assert "advantage A 0.70" in repr(drawing)  # 1 - (0.2 + 0.4) / 2
    assert "-0.00" not in drawings._numbers([-0.001, -0.0])


def test_explorer_of_lesson_1_draws_every_corner():
    example = chain.lesson_chain(10)
    responses = chain.sample(example, 200)
    for n, weights in ((1, "equal"), (5, "own"), (math.inf, "unit")):
        for informed, noise in ((0.0, 0.0), (1.0, 2.0)):
            drawing = drawings.explorer(example, responses, n, 0.95, weights, informed, noise)
            assert "nan" not in drawing.alt
    found = chain.quality(example, [chain.make_critic(example)], Estimator(), responses)
    assert drawings.aim({"exact": {"token GAE": found}}).alt.startswith("Cosine at 64 responses.")


def test_moving_a_slider_redraws_the_picture():
    """In a kernel, where display ids work: the stored output is the redrawn picture."""
    v4 = nbformat.v4
    notebook = v4.new_notebook(
        cells=[
            v4.new_code_cell(
                "import ipywidgets, torch\n"
                "from marlhf import drawings, lessons\n"
                "r, s = torch.tensor([0.0, 1.0]), torch.tensor([0, 0])\n"
                "slider = ipywidgets.FloatSlider(0.0)\n"
                "lessons.explore(lambda v: drawings.ladder(r, torch.full((2,), v), s), v=slider)"
            ),
            v4.new_code_cell("slider.value = 0.5"),
        ]
    )
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    picture, sliders = notebook.cells[0].outputs
    assert "value V(s) 0.50 0.50" in picture.data["text/plain"]
    assert "image/png" in picture.data
    assert "VBox" in sliders.data["text/plain"]
