"""Best of N: weights against every subset, hand-worked expectations, titles and sentences."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest

from marlhf import bestof, figures_samples
from marlhf.config import CONFIGS, read_yaml


def by_subsets(scores, n):
    """Weights by going through all subsets; equal best ones share a subset."""
    weights = np.zeros(len(scores))
    subsets = list(itertools.combinations(range(len(scores)), n))
    for subset in subsets:
        best = max(scores[i] for i in subset)
        winners = [i for i in subset if scores[i] == best]
        weights[winners] += 1 / len(winners)
    return weights / len(subsets)


@pytest.mark.parametrize("n", range(1, 7))
@pytest.mark.parametrize("scores", [[3, 1, 2, 6, 5, 4], [2, 2, 1, 2, 1, 3], [1, 1, 1, 1, 1, 1]])
def test_weights_are_those_of_all_subsets(scores, n):
    found = bestof.selection_weights(np.array(scores, dtype=float), n)
    np.testing.assert_allclose(found, by_subsets(scores, n), atol=1e-12)


def test_weights_by_hand():
    # of three pairs of (1, 2, 4), two have 4 as their best and one has 2
    found = bestof.selection_weights(np.array([[4.0, 1.0, 2.0]]), 2)
    np.testing.assert_allclose(found, [[2 / 3, 0, 1 / 3]])
    np.testing.assert_allclose(bestof.selection_weights(np.arange(4.0), 1), 0.25)


@pytest.mark.parametrize("n", [0, 5])
def test_no_more_than_there_are(n):
    with pytest.raises(ValueError, match=rf"best of {n}: there are 4 samples"):
        bestof.selection_weights(np.arange(4.0), n)


def repeated(arms=("token", "macro5"), chains=2, temperatures=(0.4, 0.8)):
    """Four samples of two prompts: the better by the reward model, the worse by the truth."""
    rows = []
    for arm, chain, t, prompt in itertools.product(arms, range(chains), temperatures, "pq"):
        for sample, score in enumerate([0.0, 3.0, 1.0, 2.0]):
            rows.append({
                "arm": arm, "label": arm.upper(), "chain": chain, "temperature": t,
                "prompt_id": prompt, "sample": sample,
                "rm_score": score + (arm == "macro5") + 10 * (prompt == "q") + chain,
                "true_score": 5 - score, "kl": 1.0, "length": 10 * (1 + score),
                "ref_nll": 2 * (1 + score), "finished": True,
            })  # fmt: skip
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def curves():
    return bestof.best_of_n(repeated(), ns=(1, 2, 4))


def test_the_chosen_response_by_hand(curves):
    part = curves[(curves.arm == "token") & (curves.chain == 0) & (curves.temperature == 0.4)]
    part = part.set_index("n")
    # of the six pairs of (0, 1, 2, 3) three have 3 as their best, two 2, one 1: 14 / 6
    mean = {1: 1.5, 2: 14 / 6, 4: 3.0}
    for n, best in mean.items():
        assert part.loc[n, "rm_score"] == pytest.approx(best + 5)  # prompts differ by 10
        assert part.loc[n, "true_score"] == pytest.approx(5 - best)
        assert part.loc[n, "length"] == pytest.approx(10 * (1 + best))
        assert part.loc[n, "ref_perplexity"] == pytest.approx(math.exp(0.2))
    assert part.loc[4, "kl_of_selection"] == pytest.approx(math.log(4) - 0.75)


def test_order_of_the_rows_does_not_matter(curves):
    shuffled = repeated().sample(frac=1, random_state=0).sort_values(["arm"], ascending=False)
    again = bestof.best_of_n(shuffled, ns=(1, 2, 4))
    keys = ["arm", "chain", "temperature", "n"]
    pd.testing.assert_frame_equal(
        again.sort_values(keys).reset_index(drop=True),
        curves.sort_values(keys).reset_index(drop=True),
    )


def test_a_sample_without_a_score_or_a_missing_one_is_an_error():
    table = repeated(arms=("token",))
    with pytest.raises(
        ValueError, match=r"token, chain 0, temperature 0\.4: 3 samples of prompt p"
    ):
        bestof.best_of_n(table.drop(index=0))
    with pytest.raises(ValueError, match="no RM score"):
        bestof.best_of_n(table.assign(rm_score=table["rm_score"].where(table.index > 0)))


def test_endpoints_have_the_titles_that_claims_are_judged_by(curves):
    values = bestof.endpoints(curves)
    assert len(values) == 2 * 2 * 2 * 3 * (2 + 1)
    title = "RM score of the best of 2, mean over temperatures"
    one = values[(values.endpoint == title) & (values.arm == "macro5")].set_index("chain")
    assert one["value"].tolist() == pytest.approx([14 / 6 + 6, 14 / 6 + 7])
    assert "true score of the best of 4 at temperature 0.4" in set(values.endpoint)
    parts = [p for c in read_yaml(CONFIGS / "claims.yaml")["claims"] for p in c["parts"]]
    asked = [p["endpoint"] for p in parts if p.get("experiment") == "fig08_best_of_n"]
    assert asked and set(asked) <= {bestof.title("rm_score", n) for n in bestof.COMPARED}
    assert bestof.compared_titles(curves) == [
        f"{score} of the best of {n}, mean over temperatures"
        for score in ("RM score", "true score")
        for n in (1, 4)
    ]


@pytest.mark.parametrize("samples, n", [(32, 16), (16, 16), (8, 4), (1, 1)])
def test_the_primary_endpoint_is_the_one_that_claims_name(samples, n):
    assert bestof.primary(samples) == f"RM score of the best of {n}, mean over temperatures"


def test_no_larger_n_than_the_samples_allow(curves):
    pd.testing.assert_frame_equal(bestof.best_of_n(repeated()), curves)
    assert bestof.primary(4) in set(bestof.endpoints(curves).endpoint)


def test_real_data_has_no_truth_to_choose_by(curves):
    blind = curves.assign(true_score=math.nan)
    assert set(bestof.endpoints(blind).endpoint.str[:2]) == {"RM"}
    assert len(figures_samples.best_of_n(blind).figure.axes) == 2


def test_what_selection_gains_in_words(curves):
    says = bestof.selection_sentences(curves)
    assert says[0] == (
        "TOKEN, best of 4 instead of 1: RM score +1.50 (+1.50 to +1.50), "
        "true score −1.50 (−1.50 to −1.50); +15.00 tokens."
    )
    assert len(says) == 2


def test_panels_of_a_row_share_an_axis_that_shows_all_of_them(curves):
    hot = curves["rm_score"].where(curves["temperature"] < 0.8, curves["rm_score"] - 30)
    picture = figures_samples.best_of_n(curves.assign(rm_score=hot))
    for axis in picture.figure.axes[:2]:
        low, high = axis.get_ylim()
        assert low < hot.groupby(curves["arm"]).min().max() and high > 8


def test_the_picture(curves):
    picture = figures_samples.best_of_n(curves)
    assert len(picture.figure.axes) == 4
    top, *_ = picture.figure.axes
    assert [line.get_label() for line in top.lines] == ["TOKEN", "MACRO5"]
    np.testing.assert_allclose(top.lines[0].get_ydata(), [7.0, 14 / 6 + 5.5, 8.5])
    assert [tick.get_text() for tick in top.get_xticklabels()] == ["1", "2", "4"]
    assert "RM score (SFT: 0 ± 1) at temperature 0.4: TOKEN 7 and 8.5, MACRO5" in picture.alt
