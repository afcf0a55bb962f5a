"""Win rates and agreement by hand and on made data; the endpoint judge against a stub server."""

import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import frames
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import special

from marlhf import claims, figures_judges, stats, winrates
from marlhf.config import CONFIGS, read_yaml
from marlhf.judges import CRITERIA, ByScore, Endpoint, EndpointError


@pytest.fixture
def pairs():
    """Three prompts of two chains; the arm wins, loses and ties by RM score in each."""
    rows = []
    for chain in (0, 1):
        for i, (ours, theirs) in enumerate(((2.0, 1.0), (0.5, 1.0), (1.0, 1.0))):
            rows.append({
                "arm": "macro5", "label": "MA-PPO, n = 5", "reference": "token",
                "reference_label": "token PPO", "chain": chain, "prompt_id": f"p{i}",
                "prompt": f"POST: post {i}", "response": f" ours {i} {chain}",
                "reference_response": f" theirs {i} {chain}", "rm_score": ours,
                "reference_rm_score": theirs, "true_score": 1.0, "reference_true_score": 1.2,
                "length": 10 + i, "reference_length": 10,
            })  # fmt: skip
    return pd.DataFrame(rows)


# Pairs and win rates


def test_pairs_are_last_responses_to_the_same_prompts_of_a_chain():
    samples = frames.samples(chains=2, prompts=4)
    found = winrates.pairs(samples.sample(frac=1, random_state=1), "macro5", "token")
    assert len(found) == 8
    one = found[(found["chain"] == 1) & (found["prompt_id"] == "p2")].iloc[0]
    last = samples[(samples["update"] == 110) & (samples["chain"] == 1)]
    last = last[last["prompt_id"] == "p2"].set_index("arm")
    assert one["rm_score"] == last.loc["macro5", "rm_score"]
    assert one["reference_rm_score"] == last.loc["token", "rm_score"]
    sft = winrates.pairs(samples, "macro5", "sft")
    assert sft["reference_response"].unique() == [" a summary after 0 updates."]
    assert set(sft["reference_label"]) == {"SFT"}


def test_pairs_that_do_not_fit_are_an_error():
    samples = frames.samples(chains=1, prompts=3)
    with pytest.raises(ValueError, match=r"no arm 'macro9'.*there is token, macro5"):
        winrates.pairs(samples, "macro9", "token")
    fewer = samples[(samples["arm"] != "macro5") | (samples["prompt_id"] != "p0")]
    with pytest.raises(ValueError, match="2 responses, token 3, and 2"):
        winrates.pairs(fewer, "macro5", "token")


def test_win_rates_by_hand():
    assert winrates.win_rate([1, 1, 0, -1]) == pytest.approx(0.625)
    with pytest.raises(ValueError, match=r"number 1 is nan.*2 such"):
        winrates.win_rate([1, math.nan, math.nan])
    with pytest.raises(ValueError, match="shape"):
        winrates.win_rate([])


def test_wilson_is_scipys_where_nothing_ties():
    for wins, n in ((0, 5), (7, 20), (20, 20)):
        want, got = stats.proportion_interval(wins, n), winrates.wilson(wins / n, n)
        assert (got.low, got.high) == pytest.approx((want.low, want.high))
    half = winrates.wilson(0.525, 20)  # ten and a half of twenty
    assert half.low < 0.525 < half.high


def test_scores_judge_with_a_margin_and_same_texts_tie(pairs):
    assert list(ByScore("rm_score")(pairs)) == [1, -1, 0] * 2
    assert list(ByScore("rm_score", margin=0.5)(pairs)) == [1, 0, 0] * 2
    assert list(ByScore("true_score")(pairs)) == [-1] * 6
    same = pairs.assign(reference_response=pairs["response"])
    assert not ByScore("rm_score")(same).any()
    with pytest.raises(ValueError, match="true_score of pair 0 is missing"):
        ByScore("true_score")(pairs.assign(true_score=None))


def test_length_alone_is_controlled_away():
    d = np.random.default_rng(0).integers(-3, 12, size=400)  # the arm writes longer
    outcomes = np.sign(d)
    assert winrates.win_rate(outcomes) > 0.75
    assert winrates.length_controlled(outcomes, d) == pytest.approx(0.5, abs=0.03)
    assert winrates.length_controlled(-outcomes, -d) == pytest.approx(0.5, abs=0.03)


def test_quality_alone_stays():
    generator = np.random.default_rng(1)
    d = generator.normal(8, 10, size=4000)
    outcomes = generator.choice([1, 0, -1], p=[0.6, 0.2, 0.2], size=4000)
    raw = winrates.win_rate(outcomes)
    assert raw == pytest.approx(0.7, abs=0.02)
    assert winrates.length_controlled(outcomes, d) == pytest.approx(raw, abs=0.02)


def test_length_control_finds_the_intercept_that_made_the_data():
    generator = np.random.default_rng(2)
    d = generator.normal(6, 10, size=40_000)
    chance = special.expit(0.4 + 1.2 * np.tanh(d / d.std()))
    outcomes = np.where(generator.random(len(d)) < chance, 1, -1)
    assert winrates.win_rate(outcomes) > 0.65
    found = winrates.length_controlled(outcomes, d)
    assert found == pytest.approx(special.expit(0.4), abs=0.01)


def test_where_length_control_has_nothing_to_do():
    assert winrates.length_controlled([1, 1, 1], [3, -2, 0]) == 1
    assert winrates.length_controlled([1, 0, 1], [5, 5, 5]) == pytest.approx(5 / 6)
    with pytest.raises(ValueError, match="2 outcomes"):
        winrates.length_controlled([1, 0], [1.0])


def test_the_replicate_is_the_chain(pairs):
    outcomes = {"RM score": [1, 1, 0, 1, -1, -1]}
    table = winrates.by_chain(pairs, outcomes)
    assert list(table["win_rate"]) == pytest.approx([5 / 6, 1 / 3])
    assert table.loc[0, ["wins", "ties", "losses", "pairs"]].tolist() == [2, 1, 0, 3]
    assert table["longer"].tolist() == [1, 1]
    rates = pd.DataFrame({"judge": "RM score", "win_rate": [0.5, 0.55, 0.63]})
    mean = winrates.over_chains(rates, ["win_rate"], ["judge"]).iloc[0]
    want = stats.mean_interval([0.5, 0.55, 0.63])
    assert mean[["mean", "low", "high"]].tolist() == pytest.approx([want.mean, want.low, want.high])


# Agreement


def test_kappa_by_hand():
    a = [1] * 20 + [1] * 5 + [-1] * 10 + [-1] * 15
    b = [1] * 20 + [-1] * 5 + [1] * 10 + [-1] * 15
    # agree on 35 of 50; chance (25 x 30 + 25 x 20) / 50^2 = 0.5; kappa (0.7 - 0.5) / 0.5
    assert winrates.kappa(a, b) == pytest.approx(0.4)
    # three answers: agree on 3 of 5; chance (2 x 1 + 2 x 2 + 1 x 2) / 25 = 0.32
    assert winrates.kappa([1, 1, 0, 0, -1], [1, 0, 0, -1, -1]) == pytest.approx(0.28 / 0.68)
    assert winrates.kappa([1, -1], [-1, 1]) == pytest.approx(-1)
    assert math.isnan(winrates.kappa([1, 1], [1, 1]))


def test_agreement_leaves_ties_out_and_counts_them_beside():
    found = winrates.agreement([1, 1, -1, 0, -1, 0], [1, -1, -1, 0, 0, 1])
    assert (found["decided"], found["pairs"]) == (3, 6)
    assert found["agreement"] == pytest.approx(2 / 3)
    assert found["same"] == pytest.approx(3 / 6)
    want = stats.proportion_interval(2, 3)
    assert (found["low"], found["high"]) == (want.low, want.high)
    assert math.isnan(winrates.agreement([0, 0], [1, 0])["agreement"])
    with pytest.raises(ValueError, match="2 pairs, the other 1"):
        winrates.agreement([1, 0], [1])


def test_judges_are_compared_on_what_both_answered():
    nan = math.nan
    table = winrates.agreements({"x": [1, -1, nan], "y": [1, 1, 1], "z": [nan, nan, 1]})
    assert list(zip(table["first"], table["second"], strict=True)) == [("x", "y"), ("y", "z")]
    assert table["pairs"].tolist() == [2, 1]
    assert table["agreement"].tolist() == [0.5, 1.0]


# Tables and pictures of the notebook


@pytest.fixture(scope="module")
def made():
    samples = frames.samples(chains=3, prompts=24)
    judges = {"RM score": ByScore("rm_score"), "true score": ByScore("true_score")}
    samples["response"] = samples["response"] + samples["arm"]
    parts, agreed = [], []
    for reference in ("token", "token_matched"):
        pairs = winrates.pairs(samples, "macro5", reference)
        votes = {name: judge(pairs) for name, judge in judges.items()}
        parts.append(winrates.by_chain(pairs, votes).assign(task="tldr"))
        agreed.append(winrates.agreement_by_chain(pairs, *votes.values()).assign(task="tldr"))
    return samples, pd.concat(parts), pd.concat(agreed)


def test_endpoints_have_the_titles_that_the_claims_read(made):
    _, rates, agreed = made
    table = winrates.endpoints(rates, agreed)
    parts = [p for claim in read_yaml(CONFIGS / "claims.yaml")["claims"] for p in claim["parts"]]
    asked = [p for p in parts if p.get("experiment") == "fig04_win_rates"]
    assert len(asked) == 5
    for part in (p for p in asked if " on tldr" in p["endpoint"]):
        rows = table[(table["endpoint"] == part["endpoint"]) & (table["arm"] == part["arm"])]
        assert sorted(rows["chain"]) == [0, 1, 2]
        assert rows["value"].between(0, 1).all()
    assert set(table["unit"]) == {"share"}
    assert "win rate on tldr, RM score, against token PPO, λ .9898" in set(table["endpoint"])
    assert not table.duplicated(["arm", "chain", "endpoint"]).any()
    # no pair of a chain was decided: no number, and none is made up
    none = winrates.endpoints(rates, agreed.assign(agreement=math.nan))
    assert not none["endpoint"].str.contains("agreement").any()
    assert list(claims.by_arm(table)["chains"].unique()) == [3]


def test_the_words_follow_the_interval(made):
    _, rates, _ = made
    keys = ["task", "judge", *winrates.KEYS]
    rows = winrates.over_chains(rates, ["win_rate", "length_controlled"], keys).head(2)
    says = {
        (0.55, 0.7): "preferred, ",
        (0.3, 0.45): "preferred less",
        (0.4, 0.6): "not told apart",
    }
    for (low, high), words in says.items():
        text = winrates.sentence(rows.assign(low=low, high=high))
        assert f"tldr, by RM score: MA-PPO, n = 5 against token PPO, λ .95: {words}" in text
    assert "single chain" in winrates.sentence(rows.assign(chains=1))
    assert "(50.00 to 60.00)" in winrates.sentence(rows.assign(low=0.49997, high=0.6))


def test_the_words_of_an_agreement_follow_its_interval():
    row = {"task": "tldr", "pairs": "A against B", "mean": 0.5, "low": 0.4, "high": 0.6}
    row = pd.Series({**row, "chains": 3})
    says = {(0.4, 0.6): "not told apart", (0.4, 0.45): "less than", (0.55, 0.6): "more than"}
    for (low, high), words in says.items():
        text = winrates.agreement_sentence(pd.Series({**row, "low": low, "high": high}))
        assert words in text and "A against B" in text
    assert "single chain" in winrates.agreement_sentence(pd.Series({**row, "chains": 1}))
    assert "no pair that both" in winrates.agreement_sentence(pd.Series({**row, "mean": math.nan}))


def test_intervals_of_shares_end_at_0_and_1():
    table = pd.DataFrame({"task": "t", "agreement": [0.9, 1.0, 1.0]})
    row = winrates.over_chains(table, ["agreement"], ["task"]).iloc[0]
    assert (row["mean"], row["high"]) == (pytest.approx(2.9 / 3), 1.0)


def test_texts_stand_beside_the_scores(made):
    table = winrates.texts(made[0]).set_index("arm")
    assert list(table.index) == ["sft", *frames.ARMS]
    assert table.loc["sft", "policy"] == "SFT"
    # the same five words of 24 responses, the last with the arm's name
    assert table.loc["token", "distinct-1"] == pytest.approx(5 / (24 * 5))
    assert table.loc["token", "tokens"] == 50


def test_pictures_are_labelled_and_say_their_numbers(made, tmp_path):
    samples, rates, _ = made
    keys = ["task", "judge", *winrates.KEYS]
    table = winrates.over_chains(rates, ["win_rate", "length_controlled"], keys)
    pairs = winrates.pairs(samples, "macro5", "token")
    agreed = winrates.agreement_by_chain(pairs, *[[1, -1] * (len(pairs) // 2)] * 2)
    agreed = winrates.over_chains(agreed.assign(task="tldr", pairs="MA-PPO and PPO"),
                                  ["agreement"], ["task", "pairs"])  # fmt: skip
    paper = read_yaml(CONFIGS / "paper.yaml")
    mean = table.iloc[0]["mean"]
    for name, picture, words in (
        ("rates", figures_judges.win_rates(table, paper["figure4"]), winrates.percent(mean)),
        ("rates", figures_judges.win_rates(table, paper["figure4"]), "by GPT-4, 2B 78%"),
        ("outcomes", figures_judges.outcomes(rates), "% ties"),
        ("agreement", figures_judges.agreement(agreed, paper["table1"]), "PPO 100.0%"),
        ("agreement", figures_judges.agreement(agreed, paper["table1"]), "people 74 to 76%"),
    ):
        assert words in picture.alt
        for axis in picture.figure.axes:
            assert axis.get_xlabel()
            assert all(t.get_fontsize() >= 11 for t in axis.get_yticklabels())
        with Image.open(picture.save(tmp_path / f"{name}.png")) as image:
            assert image.width == 1350


def test_without_a_truth_there_is_one_judge(made):
    rates = made[1][made[1]["judge"] == "RM score"]
    table = winrates.endpoints(rates)
    assert len(table) == 2 * len(rates)
    assert not table["endpoint"].str.contains("true score").any()
    assert len(figures_judges.outcomes(rates).figure.axes) == 1


def test_a_single_chain_has_points_and_no_intervals(made):
    rates = made[1]
    keys = ["task", "judge", *winrates.KEYS]
    one = winrates.over_chains(rates[rates["chain"] == 0], ["win_rate"], keys)
    assert np.isinf(one["high"]).all()
    assert "inf" not in figures_judges.win_rates(one, {}).alt


# An endpoint


def verdict(better, marks=(7, 4), criteria=CRITERIA["hh"]):
    grades = {name: dict(zip("AB", marks, strict=True)) for name in criteria}
    return json.dumps({"grades": grades, "better": better})


class Stub(ThreadingHTTPServer):
    """A chat endpoint that answers by `say(request body) -> text, or (status, text)`."""

    daemon_threads = True

    def __init__(self, say):
        self.say, self.seen, self.keys = say, [], []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.seen.append(body)
                stub.keys.append((self.path, self.headers.get("Authorization")))
                said = stub.say(body)
                status, text = said if isinstance(said, tuple) else (200, said)
                reply = {"choices": [{"message": {"content": text}}],
                         "usage": {"prompt_tokens": 1000, "completion_tokens": 100}}  # fmt: skip
                raw = json.dumps(reply).encode() if status == 200 else text.encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_):
                pass

        super().__init__(("127.0.0.1", 0), Handler)


@pytest.fixture
def serve(tmp_path):
    """serve(say, **settings) -> (judge, stub); every server is closed at the end."""
    stubs = []

    def start(say, criteria=CRITERIA["hh"], **settings):
        stub = Stub(say)
        stubs.append(stub)
        threading.Thread(target=stub.serve_forever, args=(0.02,), daemon=True).start()
        settings = {"cache": tmp_path / "answers", "wait": 0.001, "model": "stub"} | settings
        url = f"http://127.0.0.1:{stub.server_port}/v1/"
        return Endpoint(criteria, url=url, **settings), stub

    yield start
    for stub in stubs:
        stub.shutdown()
        stub.server_close()


def likes_ours(body):
    """Prefers the arm's response, wherever it stands."""
    text = body["messages"][1]["content"]
    return verdict("A", (8, 3)) if "<response-A>\nours" in text else verdict("B", (3, 8))


def test_both_orders_are_asked_and_grades_follow_their_response(pairs, serve):
    judge, stub = serve(likes_ours, key="a-secret")
    table = judge.answers(pairs)
    assert len(stub.seen) == 2 * len(pairs)
    assert table["outcome"].tolist() == [1] * 6
    assert set(table["helpfulness"]) == {8}
    assert set(table["reference_helpfulness"]) == {3}
    assert set(stub.keys) == {("/v1/chat/completions", "Bearer a-secret")}
    stored = "".join(p.read_text() for p in judge.cache.iterdir())
    assert "a-secret" not in stored + repr(judge)
    assert "post 0" in stub.seen[0]["messages"][1]["content"]


def test_an_answer_by_position_is_a_tie_in_both_orders_and_noise_in_one(pairs, serve):
    judge, _ = serve(lambda body: verdict("A"))
    assert judge(pairs).tolist() == [0] * 6
    many = pd.concat([pairs.assign(prompt=f"{i}") for i in range(7)], ignore_index=True)
    once, stub = serve(lambda body: verdict("A"), swap=False)
    outcomes = once(many)
    assert len(stub.seen) == len(many)
    assert 10 < (outcomes == 1).sum() < 32  # a fair coin's, of 42
    assert (outcomes == once(many)).all()


def test_nothing_is_paid_twice(pairs, serve, capsys):
    judge, stub = serve(likes_ours)
    twice = pd.concat([pairs, pairs.head(2)], ignore_index=True)
    first = judge(twice)
    assert len(stub.seen) == 12
    assert (judge(twice) == first).all()
    assert len(stub.seen) == 12
    assert "stub: 0 requests (12 answered before)" in capsys.readouterr().out
    judge.model = "another"
    judge(pairs)
    assert len(stub.seen) == 24


@pytest.mark.parametrize("bad, why", [
    ("I like A.", "no JSON object"),
    (verdict("C"), '"better" is \'C\''),
    (verdict("A", (11, 3)), "helpfulness is 11"),
    (verdict("A", (True, 3)), "helpfulness is True"),
    (verdict("A", criteria=["wit"]), "must have helpfulness"),
    (json.dumps({"better": "A", "grades": {"helpfulness": 3}}), 'those of "A" and of "B"'),
])  # fmt: skip
def test_a_bad_answer_is_asked_for_once_more_and_then_none(pairs, serve, capsys, bad, why):
    judge, stub = serve(lambda body: bad)
    table = judge.answers(pairs.head(1))
    assert table["outcome"].isna().all()
    assert why in table["problem"][0]
    assert len(stub.seen) == 4
    assert [m["role"] for m in stub.seen[-1]["messages"]][2:] == ["assistant", "user"]
    assert "1 of 1 pairs have no usable answer" in capsys.readouterr().out
    mended, _ = serve(lambda body: bad if len(body["messages"]) == 2 else verdict("tie"))
    assert mended(pairs.head(1)).tolist() == [0]


def test_json_may_stand_in_a_fence(pairs, serve):
    judge, _ = serve(lambda body: f"```json\n{likes_ours(body)}\n```")
    assert judge(pairs.head(1)).tolist() == [1]


def test_a_busy_endpoint_is_tried_again(pairs, serve):
    left = {429: 2, 503: 1}

    def busy_at_first(body):
        for status in left:
            if left[status]:
                left[status] -= 1
                return status, "busy"
        return likes_ours(body)

    judge, stub = serve(busy_at_first, parallel=1)
    assert judge(pairs.head(1)).tolist() == [1]
    assert len(stub.seen) == 5


def test_pauses_double(pairs, serve, monkeypatch):
    pauses = []
    judge, _ = serve(lambda body: (500, "broken"), parallel=1, tries=4, wait=1.0)
    monkeypatch.setattr(time, "sleep", pauses.append)
    with pytest.raises(EndpointError, match=r"failed 4 times, the last with 500: broken"):
        judge(pairs.head(1))
    assert pauses[:3] == [1, 2, 4]


def test_an_endpoint_that_fails_keeps_what_was_answered(pairs, serve):
    calls = []

    def dies(body):
        calls.append(body)
        return likes_ours(body) if len(calls) <= 3 else (500, "broken")

    judge, _ = serve(dies, parallel=1, tries=2)
    with pytest.raises(EndpointError, match="run it again to go on"):
        judge(pairs)
    assert len(list(judge.cache.iterdir())) == 3


def test_a_refusal_is_not_tried_again(pairs, serve):
    judge, stub = serve(lambda body: (401, "no such key"), parallel=1)
    with pytest.raises(EndpointError, match=r"401: no such key.*look at url, model and key"):
        judge(pairs.head(1))
    assert len(stub.seen) == 1


def test_a_slow_endpoint_times_out(pairs, serve):
    judge, _ = serve(lambda body: time.sleep(0.5) or "", parallel=1, tries=2, timeout=0.05)
    with pytest.raises(EndpointError, match="failed 2 times, the last with TimeoutError"):
        judge(pairs.head(1))


def test_the_cost_comes_first_and_a_budget_is_kept(pairs, serve, capsys):
    judge, stub = serve(likes_ours, price_in=2.0, price_out=10.0, budget=0.001)
    with pytest.raises(ValueError, match=r"12 requests.*above the budget of 0\.001; nothing was"):
        judge(pairs)
    assert not stub.seen
    judge, stub = serve(likes_ours, price_in=2.0, price_out=10.0, budget=1.0)
    judge(pairs)
    sent = sum(len(m["content"]) for body in stub.seen for m in body["messages"]) / 3
    want = (sent * 2 + 12 * judge.max_tokens * 10) / 1e6
    assert f"{12 * judge.max_tokens:,} back, {want:.2f} at the prices" in capsys.readouterr().out
    assert judge.spent == pytest.approx(12 * (1000 * 2 + 100 * 10) / 1e6)


def test_spending_stops_where_the_estimate_was_too_low(pairs, serve):
    judge, stub = serve(likes_ours, price_in=2.0, price_out=0.0, budget=0.021, parallel=1)
    pairs = pd.concat([pairs.assign(prompt=f"{i}") for i in range(2)], ignore_index=True)
    with pytest.raises(EndpointError, match="over the budget"):
        judge(pairs)  # the stub counts 1,000 tokens a request, 0.002 each
    assert len(stub.seen) == 11


def test_settings_come_from_the_environment_and_are_checked(tmp_path, monkeypatch):
    for name in ("URL", "MODEL", "KEY"):
        monkeypatch.delenv(f"MARLHF_JUDGE_{name}", raising=False)
    with pytest.raises(ValueError, match="set MARLHF_JUDGE_URL"):
        Endpoint(CRITERIA["tldr"], model="m")
    monkeypatch.setenv("MARLHF_JUDGE_URL", "http://example.org/v1/")
    monkeypatch.setenv("MARLHF_JUDGE_MODEL", "m")
    judge = Endpoint(CRITERIA["tldr"], cache=tmp_path, options={"response_format": None, "n": 1})
    assert (judge.url, judge.model, judge.key) == ("http://example.org/v1", "m", "")
    pair = {"prompt": "p", "response": "a", "reference_response": "b"}
    body = judge.request(pair, False)
    assert "response_format" not in body and body["n"] == 1
    for name in CRITERIA["tldr"]:
        assert name in body["messages"][0]["content"]
    with pytest.raises(ValueError, match="price_in and price_out"):
        Endpoint(CRITERIA["tldr"], cache=tmp_path, budget=1.0)
    with pytest.raises(ValueError, match="http"):
        Endpoint(CRITERIA["tldr"], url="file:///etc", cache=tmp_path)
