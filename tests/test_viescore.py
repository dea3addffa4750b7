"""The judge: what is read from answers, how they are averaged, what the paper published.   pytest tests/test_viescore.py"""

import numpy as np
import pytest
from fake_server import FakeServer

from data import resize
from evaluation import chat, viescore
from evaluation.benchmark import Sample
from scenes import make_pair


@pytest.mark.parametrize("answer, scores", [
    ('{"score": [7, 4], "reasoning": "good"}', [7, 4]),
    ('{"score": [7.5, 4.25], "reasoning": "good"}', [7.5, 4.25]),
    ('```json\n{"score": [7, 4], "reasoning": "good"}\n```', [7, 4]),
    ('||V^=^V||\n{"score": [7, 4], "reasoning": "good"}\n||V^=^V||', [7, 4]),
    ('Here it is: {"score": [7, 4], "reasoning": "a [sic] b"} and no more.', [7, 4]),
    ('{score: [7, 4], reasoning: "bare keys"}', [7, 4]),
    ('{"score": [7, 4,], "reasoning": "commas",}', [7, 4]),
    ('{"score": [7,\n4],\n"reasoning": "line\nbroken"}', [7, 4]),
    ('<think>{"score": [1, 1]}? No.</think>{"score": [7, 4]}', [7, 4]),
    ("[7, 4]", [7, 4]),
    ("I rate it [7, 4].", [7, 4]),
    ('{"score": [12, -3]}', [10, 0]),
    ('{"score": 6, "reasoning": "one"}', [6]),
    ('{"score": [6]}', [6]),
    (" 6\n", [6]),
])
def test_answers_that_can_be_read(answer, scores):
    assert viescore.parse_scores(answer) == scores


@pytest.mark.parametrize("answer", [
    "", "I cannot rate this picture.", '{"score": [7, 4, 2]}', '{"score": []}', '{"score": ["seven", "four"]}',
    '{"score": [true, 4]}', '{"score": [NaN, 4]}', '{"score": [1e999, 4]}', '{"score": null}', '{"score": {"a": 1}}',
    '{"reasoning": "forgot it"}', "{}", '{"score": [7, 4], "reasoning": "cut o', "[7, 4, 2]", "<think>7, 4", "[[7, 4]]",
    '{"score": [[7, 4]]}',
])
def test_answers_that_cannot(answer):
    with pytest.raises(ValueError):
        viescore.parse_scores(answer)


class Scripted:
    """A chat that gives these answers in turn, an exception being raised, and remembers what it was asked."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def ask(self, parts, version, attempt=0, images_first=False):
        self.asked.append((parts, version, attempt, images_first))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


SOURCE = np.arange(16 * 24 * 3, dtype=np.uint8).reshape(16, 24, 3)
EDIT = np.full((32, 48, 3), 90, np.uint8)
RATED = '{"score": [8, 6]}'


def test_what_each_call_sees():
    client = Scripted(RATED, '{"score": [9, 7]}')
    rating = viescore.judge(client, SOURCE, EDIT, " Move the cup to the left. ", images_first=True)
    (sc, sc_version, *_), (pq, pq_version, *_) = client.asked
    assert [type(part) for part in sc] == [str, np.ndarray, np.ndarray] and [type(part) for part in pq] == [str, np.ndarray]
    assert sc[0].endswith("Move the cup to the left.") and "cup" not in pq[0] and "nstruction" not in pq[0]
    np.testing.assert_array_equal(sc[1], SOURCE)
    for picture in (sc[2], pq[1]):  # at the source's size
        np.testing.assert_array_equal(picture, resize(EDIT, 16, 24))
    assert sc_version != pq_version and all(call[3] for call in client.asked)
    assert viescore.scores(rating) == (0.6, 0.7)


def test_unreadable_answers_are_asked_again_with_a_reminder():
    client = Scripted("Hm.", '{"score": [1, 2, 3]}', RATED, RATED)
    rating = viescore.judge(client, SOURCE, EDIT, "Move it.")
    assert viescore.scores(rating) == (0.6, 0.6) and rating["sc"]["answers"] == ["Hm.", '{"score": [1, 2, 3]}', RATED]
    first, second, third, _ = client.asked
    assert [call[2] for call in client.asked] == [0, 1, 2, 0]
    assert second[0][0] == third[0][0] != first[0][0] and second[0][0].startswith(first[0][0]) and "JSON" in second[0][0]


def test_after_three_attempts_the_sample_fails():
    client = Scripted("no", "no", "no", RATED)
    rating = viescore.judge(client, SOURCE, EDIT, "Move it.")
    assert rating["sc"]["scores"] is None and rating["sc"]["problem"] and viescore.scores(rating) is None
    assert rating["pq"]["scores"] == [8, 6]


def test_a_server_that_gives_up_fails_the_sample_but_a_refusal_ends_the_run():
    client = Scripted(chat.ChatError("No answer."), RATED)
    assert viescore.judge(client, SOURCE, EDIT, "Move it.")["sc"]["problem"] == "No answer." and len(client.asked) == 2
    with pytest.raises(chat.ChatRefused):
        viescore.judge(Scripted(chat.ChatRefused("Wrong key.")), SOURCE, EDIT, "Move it.")


def test_one_number_is_used_and_flagged():
    rating = viescore.judge(Scripted("7", RATED), SOURCE, EDIT, "Move it.")
    assert viescore.scores(rating) == (0.7, 0.6)
    assert viescore.summarise([rating], ["all"])["one_number"] == 1


def ratings(*pairs):
    return [{key: {"scores": None if x is None else [x, 10], "one_number": False} for key, x in zip(("sc", "pq"), pair)} for pair in pairs]


def test_averages():
    found = viescore.summarise(ratings((9, 4), (1, 9), (4, 4), (None, 9), (9, None)), ["a", "a", "b", "b", "c"])
    assert (found["n"], found["failed"]) == (3, 2)
    sc, pq = 14 / 30, 17 / 30
    assert found["SC"][0] == pytest.approx(sc) and found["PQ"][0] == pytest.approx(pq)
    assert found["O"][0] == pytest.approx((sc * pq) ** 0.5)
    assert found["O_sample_mean"][0] == pytest.approx((0.6 + 0.3 + 0.4) / 3)
    assert found["group_means"] == pytest.approx({"SC": (0.5 + 0.4) / 2, "PQ": (0.65 + 0.4) / 2, "O": (0.45 + 0.4) / 2})
    assert found["O_sample_mean"][0] <= found["O"][0]
    for name in ("SC", "PQ", "O", "O_sample_mean"):
        assert found[name][1] < found[name][0] < found[name][2]
    nothing = viescore.summarise(ratings((None, 3)), ["a"])
    assert (nothing["n"], nothing["failed"]) == (0, 1) and np.isnan([nothing["O"][0], nothing["group_means"]["O"]]).all()


def test_interval_of_o_covers_the_truth():
    """O's interval resamples SC and PQ together: here they move against each other, and O of the means hardly varies."""
    rng = np.random.default_rng(0)
    inside, widths = 0, []
    for _ in range(60):
        sc = rng.integers(1, 10, 60)
        _, low, high = viescore.summarise(ratings(*zip(sc, 10 - sc)), ["a"] * 60)["O"]
        inside += low <= 0.5 <= high + 1e-9
        widths.append(high - low)
    assert np.mean(widths) < 0.02  # independent resampling of the two gives about 0.09


@pytest.mark.parametrize("row", viescore.PAPER + viescore.PAPER_ABLATION, ids=lambda row: row.method)
def test_published_rows_are_o_of_the_means(row):
    assert f"{viescore.overall(row.sc, row.pq):.3f}" == f"{row.o:.3f}"


def test_there_are_eleven_published_rows():
    assert len(viescore.PAPER + viescore.PAPER_ABLATION) == 11


# The sanity set


def sample(index, empty=True):
    pair = make_pair(5, "plain", "seen", 96, index=index)
    return Sample(pair.ref, pair.tgt, pair.empty if empty else None, pair.mask_ref, pair.mask_tgt), pair.instruction


def sanity(judge_pictures, samples):
    return viescore.sanity_verdict({case: [judge_pictures(case, *s) for s in samples] for case in viescore.SANITY})


def test_a_fair_judge_passes_the_sanity_set():
    with FakeServer() as server:
        client = chat.Chat(chat.Endpoint(server.url, "judge"), None)
        rows, passed = sanity(lambda case, s, text: viescore.judge(client, s.ref, viescore.sanity_pictures(s)[case], text),
                              [sample(i) for i in range(4)])
    assert passed and [row[-1] for row in rows] == ["pass"] * 6, rows


@pytest.mark.parametrize("wrong, verdicts", [
    ({}, ["pass"] * 6),
    ({"target": (3, 9)}, ["FAIL"] + ["pass"] * 5),
    ({"source unedited": (9, 9)}, ["pass"] * 2 + ["FAIL"] + ["pass"] * 3),
    ({"object erased": (9, 9)}, ["pass"] * 4 + ["FAIL", "pass"]),
    ({"target with noise": (9, 9)}, ["pass"] * 5 + ["FAIL"]),
    ({"target with noise": (None, 1)}, ["pass"] * 5 + ["FAIL"]),
])
def test_a_judge_that_errs_is_found_out(wrong, verdicts):
    right = {"target": (9, 9), "source unedited": (0, 9), "object erased": (1, 8), "target with noise": (7, 1)}
    rows, passed = viescore.sanity_verdict({case: ratings((right | wrong)[case]) for case in viescore.SANITY})
    assert [row[-1] for row in rows] == verdicts and passed == (not wrong)


def test_a_judge_that_mostly_fails_does_not_pass():
    right = {"target": (9, 9), "source unedited": (0, 9), "object erased": (1, 8), "target with noise": (7, 1)}
    for failed, passes in ((1, True), (2, False)):
        cases = {case: ratings(pair, *[(None, 5)] * failed) for case, pair in right.items()}
        assert viescore.sanity_verdict(cases)[1] == passes


def test_the_object_is_erased_without_a_render_of_the_empty_scene():
    s, _ = sample(0, empty=False)
    truth, _ = sample(0)
    erased = viescore.sanity_pictures(s)["object erased"]
    near = np.abs(erased.astype(float) - truth.empty)[s.mask_ref].mean()
    assert near < 0.35 * np.abs(s.ref.astype(float) - truth.empty)[s.mask_ref].mean()
    assert (erased == s.ref).all(-1).mean() > 0.7
