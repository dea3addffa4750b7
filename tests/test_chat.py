"""The endpoint client against a server that fails like real ones. pytest tests/test_chat.py"""

import argparse
import email.utils
import hashlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from evaluation import chat
from evaluation.answers import parse_json
from evaluation.chat import Chat, ChatError, ChatRefused, Endpoint, run
from tests.fake_server import HTTP_FAILURES, ODD_ANSWERS, FakeServer

ROOT = Path(__file__).parent.parent
QUICK = {"timeout": 0.5, "backoff": 0.01}
SLOW = {"hang": 0.8, "retry_after": 0.02}  # of the server: later than the client waits


def pictures(shift: int = 12) -> list[np.ndarray]:
    """A red square before and after it moved right."""
    both = np.full((2, 32, 32, 3), 190, np.uint8)
    both[0, 14:20, 4:10] = both[1, 14:20, 4 + shift:10 + shift] = (200, 30, 30)
    return list(both)


def question(number: int = 0) -> list:
    a, b = pictures()
    return ["BEFORE:", a, "AFTER:", b, f"The moved object is: red box {number}."]


def bodies(client: Chat, count: int) -> list[str]:
    """The hashes by which the server counts question(0), question(1), ..."""
    return [hashlib.sha256(client.body(question(i))).hexdigest() for i in range(count)]


@pytest.mark.parametrize("kind", HTTP_FAILURES + ("503", "408"))
def test_a_call_that_fails_is_sent_again(kind, tmp_path):
    with FakeServer(script=[kind, None], blunders=0, **SLOW) as server:
        client = Chat(Endpoint(server.url, "m", **QUICK), tmp_path / "calls.jsonl")
        assert "right" in parse_json(client.ask(question(), "v"))["instruction"]
        assert server.stats()["requests"] == 2
        assert client.counts["asked"] == client.counts["retries"] == 1 and client.counts["failed"] == 0
        assert len((tmp_path / "calls.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("kind", (None,) + ODD_ANSWERS)
def test_a_complete_answer_is_never_asked_for_again(kind, tmp_path):
    cache = tmp_path / "new" / "calls.jsonl"
    with FakeServer(script=[kind]) as server:
        end = Endpoint(server.url, "m", **QUICK)
        first = Chat(end, cache)
        answer = first.ask(question(), "v")
        assert (answer == "") == (kind == "empty")
        second = Chat(end, cache)
        assert first.ask(question(), "v") == second.ask(question(), "v") == second.known(question(), "v") == answer
        assert server.stats()["requests"] == 1
        assert (first.counts["asked"], first.counts["from_cache"]) == (1, 1)
        assert (second.counts["asked"], second.counts["from_cache"]) == (0, 1)
        assert first.counts["prompt_tokens"] > 2 and first.counts["completion_tokens"] == 40
    record = json.loads(cache.read_text())
    assert record["model"] == "m" and record["answer"] == answer and len(record["pictures"]) == 2
    assert record["finish"] == ("length" if kind in ("empty", "cut") else "stop")


def test_giving_up_is_not_remembered(tmp_path):
    with FakeServer(script=["500", "torn", "429"], **SLOW) as server:
        client = Chat(Endpoint(server.url, "m", retries=2, **QUICK), tmp_path / "calls.jsonl")
        with pytest.raises(ChatError, match="3 tries.*429"):
            client.ask(question(), "v")
        assert client.counts["failed"] == 1 and client.counts["retries"] == 2 and server.stats()["requests"] == 3
        assert client.ask(question(), "v") and server.stats()["requests"] == 4


def test_a_server_that_wants_an_hour_is_given_up(tmp_path):
    with FakeServer(script=["429"], retry_after=3600) as server:
        with pytest.raises(ChatError, match="1 tries"):
            Chat(Endpoint(server.url, "m", **QUICK), None).ask(question(), "v")


@pytest.mark.parametrize("status", ("400", "401", "403", "404", "302"))
def test_a_refusal_stops_at_once_and_keeps_the_key(status, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret\n")
    with FakeServer(script=[None, status]) as server:
        client = Chat(Endpoint(server.url, "m", "MY_KEY", **QUICK), tmp_path / "calls.jsonl")
        client.ask(question(0), "v")
        assert server.last[-1][1] == "Bearer sk-secret"
        for _ in range(2):  # the second is not even sent
            with pytest.raises(ChatRefused, match=f"HTTP {status}: Failure on purpose for Bearer .*--model") as refusal:
                client.ask(question(1), "v")
            assert "secret" not in str(refusal.value)
        assert server.stats()["requests"] == 2 and client.counts["failed"] == 0
    assert "secret" not in (tmp_path / "calls.jsonl").read_text()


def test_a_wrong_key_and_no_server(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with FakeServer(key="right") as server:
        with pytest.raises(ChatRefused, match="401: Incorrect API key provided: EMPTY"):
            Chat(Endpoint(server.url, "m", **QUICK), None).ask(question(), "v")
        monkeypatch.setenv("OPENAI_API_KEY", "right")
        assert Chat(Endpoint(server.url, "m", **QUICK), None).ask(question(), "v")
    with pytest.raises(ChatRefused, match="Nothing listens at"):
        Chat(Endpoint(server.url, "m", backoff=1000), None).ask(question(), "v")
    monkeypatch.setenv("OPENAI_API_KEY", "sec ret")
    with pytest.raises(ValueError, match=r"\$OPENAI_API_KEY") as error:
        Chat(Endpoint(server.url, "m"), None)
    assert "sec ret" not in str(error.value)


def test_retry_after_is_honoured():
    with FakeServer(script=["429"], retry_after=0.4) as server:
        Chat(Endpoint(server.url, "m", **QUICK), None).ask(question(), "v")
        assert server.last[1][0] - server.last[0][0] >= 0.4
    assert chat.retry_after("7") == 7 and chat.retry_after(None) == chat.retry_after("soon") == chat.retry_after("-3") == 0
    assert 25 < chat.retry_after(email.utils.formatdate(time.time() + 30, usegmt=True)) <= 30


def test_threads_share_a_request():
    with FakeServer(delay=0.3) as server:
        client = Chat(Endpoint(server.url, "m", **QUICK), None)
        answers = run(range(8), lambda _: client.ask(question(), "v"), 8, "same")
        assert len(set(answers)) == 1 and server.stats()["requests"] == 1
        assert (client.counts["asked"], client.counts["from_cache"]) == (1, 7)


def test_only_the_same_question_is_known():
    a, b = pictures()
    other = b.copy()
    other[0, 0, 0] ^= 1
    with FakeServer() as server:
        end = {"url": server.url, "model": "m", "temperature": 0.0}
        client = Chat(Endpoint(**end), None)
        client.ask([a, b, "x"], "v")
        assert client.known([a.copy(), b.copy(), "x"], "v") is not None
        for parts in ([a, other, "x"], [b, a, "x"], [a, b, "y"], [a, "x", b], [a, b]):
            assert client.known(parts, "v") is None
        assert client.known([a, b, "x"], "w") is None and client.known([a, b, "x"], "v", attempt=1) is None
        key = client.key([a, b, "x"], "v")
        assert Chat(Endpoint(**end | {"url": "http://elsewhere/v1", "timeout": 3}), None).key([a, b, "x"], "v") == key
        for change in ({"model": "n"}, {"temperature": 0.5}, {"temperature": None}, {"max_tokens": 7},
                       {"token_field": "max_completion_tokens"}):
            assert Chat(Endpoint(**end | change), None).key([a, b, "x"], "v") != key


def test_what_is_sent():
    a, b = pictures()
    with FakeServer() as server:
        client = Chat(Endpoint(server.url + "/", "gpt-5", token_field="max_completion_tokens", max_tokens=2000, temperature=None), None)
        client.ask(["one", a, "two", b], "v")
        client.ask(["one", a, "two", b], "v", images_first=True)
        (_, _, plain), (_, _, first) = server.last
        with pytest.raises(ChatRefused, match="max_tokens"):
            Chat(Endpoint(server.url, "gpt-5"), None).ask(["one", a, b], "v")
    assert {k: v for k, v in plain.items() if k != "messages"} == {"model": "gpt-5", "max_completion_tokens": 2000}
    assert [part["type"] for part in plain["messages"][0]["content"]] == ["text", "image_url"] * 2
    assert [part["type"] for part in first["messages"][0]["content"]] == ["image_url"] * 2 + ["text"] * 2
    assert [part.get("text") for part in first["messages"][0]["content"]] == [None, None, "one", "two"]
    shown = [part["image_url"]["url"] for part in first["messages"][0]["content"][:2]]
    assert shown == [chat.data_url(a), chat.data_url(b)]


def test_a_torn_cache_loses_one_answer(tmp_path):
    cache = tmp_path / "calls.jsonl"
    with FakeServer() as server:
        end = Endpoint(server.url, "m", **QUICK)
        first = Chat(end, cache)
        answers = [first.ask(question(i), "v") for i in range(3)]
        whole = cache.read_bytes()
        cache.write_bytes(whole[:-20])
        for expected in (4, 4):  # the torn one is asked for again and then known for good
            again = Chat(end, cache)
            assert [again.ask(question(i), "v") for i in range(3)] == answers
            assert server.stats()["requests"] == expected
        assert [n for n, _ in server.stats()["bodies"].values()] == [1, 1, 2]


def test_an_unwritable_cache_is_found_before_paying(tmp_path):
    with FakeServer() as server:
        with pytest.raises(OSError):
            Chat(Endpoint(server.url, "m"), tmp_path / "file" / "calls.jsonl" if (tmp_path / "file").write_text("x") else None
                 ).ask(question(), "v")
        assert server.stats()["requests"] == 0


def test_two_runs_share_a_cache_file(tmp_path):
    with FakeServer() as server:
        end, cache = Endpoint(server.url, "m" * 3000), tmp_path / "calls.jsonl"
        two = [Chat(end, cache), Chat(end, cache)]
        run(range(40), lambda i: two[i % 2].ask(question(i), "v"), 8, "two")
        third = Chat(end, cache)
        assert all(third.known(question(i), "v") for i in range(40))


def start(url: str, cache: Path, jobs: int) -> subprocess.Popen:
    script = f"""
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs the tests in the background ignores it
from evaluation.chat import Chat, Endpoint, run
from tests.test_chat import question
client = Chat(Endpoint({url!r}, "m", timeout=0.5, backoff=0.01), {str(cache)!r})
run(range({jobs}), lambda i: client.ask(question(i), "v"), 8, "calls")
"""
    return subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE, text=True)


def wait_for(server: FakeServer, answers: int) -> None:
    for _ in range(600):
        if server.stats()["answered"] >= answers:
            return
        time.sleep(0.05)
    raise AssertionError(f"The server gave only {server.stats()['answered']} answers in 30 seconds.")


def test_a_killed_run_repeats_no_answered_call(tmp_path):
    """With 30 % failures; the answers on their way at the kill, at most one a thread, may be asked for again."""
    jobs, cache = 80, tmp_path / "calls.jsonl"
    with FakeServer(failures=0.3, delay=0.05, **SLOW) as server:
        process = start(server.url, cache, jobs)
        wait_for(server, 30)
        process.kill()
        process.communicate()
        time.sleep(0.3)  # for answers that were being written
        client = Chat(Endpoint(server.url, "m"), cache)
        kept = [body for i, body in enumerate(bodies(client, jobs)) if client.known(question(i), "v") is not None]
        before = server.stats()
        assert 20 <= len(kept) < jobs and before["answered"] - len(kept) <= 8
        process = start(server.url, cache, jobs)
        assert process.wait(60) == 0, process.stderr.read()
        after = server.stats()
    assert set(kept) <= set(after["bodies"]) and all(after["bodies"][body] == before["bodies"][body] for body in kept)
    assert after["answered_more_than_once"] <= before["answered"] - len(kept)
    assert all(answers for _, answers in after["bodies"].values()) and len(after["bodies"]) == jobs
    assert set(HTTP_FAILURES) <= set(after["drawn"])  # the failures were there


def test_half_a_request_is_none():
    """A client killed while it sends leaves half a body, which the counts of the fake server must not hold."""
    with FakeServer() as server:
        with socket.create_connection(server.server_address) as client:
            client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 40\r\n\r\n{")
            client.shutdown(socket.SHUT_WR)
            client.recv(100)  # until the server has closed, or answered
        assert server.stats()["requests"] == 0


def test_ctrl_c_keeps_what_was_asked(tmp_path):
    jobs, cache = 60, tmp_path / "calls.jsonl"
    with FakeServer(delay=0.3) as server:
        process = start(server.url, cache, jobs)
        wait_for(server, 10)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert process.returncode != 0 and "Waiting for the calls under way" in errors
        stopped = server.stats()
        assert stopped["requests"] == stopped["answered"] < jobs
        assert len(cache.read_text().splitlines()) == stopped["answered"]
        assert start(server.url, cache, jobs).wait(60) == 0
        assert server.stats()["requests"] == jobs


def test_run_keeps_the_order_and_stops_at_an_error(capsys):
    def late(i):
        time.sleep(0.002 * (i % 3 == 0))
        return i * i
    assert run(range(50), late, 7, "squares") == [i * i for i in range(50)]
    assert "squares: 50/50" in capsys.readouterr().err
    assert run([], str, 4, "none") == []
    begun, lock = [], threading.Lock()

    def work(i):
        with lock:
            begun.append(i)
        time.sleep(0.01)
        if i == 5:
            raise ChatRefused("no")

    with pytest.raises(ChatRefused):
        run(range(1000), work, 4, "stops")
    count = len(begun)
    time.sleep(0.1)
    assert len(begun) == count < 50


@pytest.mark.parametrize("text, value", [
    ('{"score": [8, 9], "reasoning": "fine"}', {"score": [8, 9], "reasoning": "fine"}),
    ('```json\n{"score": [8, 9]}\n```', {"score": [8, 9]}),
    ('Sure [as asked]:\n{"a": {"b": [1, {"c": "}{"}]}}\nBye.', {"a": {"b": [1, {"c": "}{"}]}}),
    ('||V^=^V||\n{"score": [1, 2]}\n||V^=^V||', {"score": [1, 2]}),
    ("[8, 9]", [8, 9]),
    ("I would say [7.5, 3] here", [7.5, 3]),
    ('{score: [1, 2], reasoning: "so, note: {this}, x: y"}', {"score": [1, 2], "reasoning": "so, note: {this}, x: y"}),
    ('{"score": [1, 2,], "reasoning": "a, ]",}', {"score": [1, 2], "reasoning": "a, ]"}),
    ("{'score': [1, 2]}", {"score": [1, 2]}),
    ('{"reasoning": "two\nlines and a \\" quote"}', {"reasoning": 'two\nlines and a " quote'}),
    ('<think>maybe {"score": [0, 0]}</think>{"score": [5, 6]}', {"score": [5, 6]}),
    ('the opening tag is lost [1, 2]</think>{"score": [5, 6]}', {"score": [5, 6]}),
    ('{"score": [0, 0]} was the form. Mine: {"score": [5, 6]}', {"score": [5, 6]}),
    (" 7 ", 7),
])
def test_answers_that_can_be_read(text, value):
    assert parse_json(text) == value


@pytest.mark.parametrize("text, reason", [
    ("", "token budget"), (" \n", "token budget"), ("<think>so far", "token budget"), ("<think>a</think>", "token budget"),
    ('{"score": [8, 9], "reasoning": "the ob', "cut off"), ("[8, 9", "cut off"), ('{"reasoning": "at [3, 4] the', "cut off"),
    ("nothing here", "no JSON"), ('{"score": [NaN, 1]}', "broken"), ('{"score": [8 9]}', "broken"), ("{not json}", "broken"),
])
def test_answers_that_cannot(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_json(text)


def test_flags():
    def parse(*argv):
        parser = argparse.ArgumentParser()
        chat.add_arguments(parser, model="M", max_tokens=200, temperature=0.2)
        return chat.endpoint_of(parser.parse_args(argv))
    url = "http://localhost:8000/v1"
    assert parse("--url", url) == Endpoint(url, "M", max_tokens=200, temperature=0.2)
    assert parse("--url", url, "--temperature", "omit", "--key-env", "K", "--timeout", "7").temperature is None
    for wrong, sentence in ((["--url", "localhost:8000"], "--url like"), (["--url", "https://me:key@host/v1"], "--url like"),
                            ([], "--url"), (["--url", url, "--temperature", "warm"], "'warm'"),
                            (["--url", url, "--threads", "0"], "--threads"), (["--url", url, "--max-tokens", "0"], "--max-tokens")):
        with pytest.raises(ValueError, match=sentence) as error:
            parse(*wrong)
        assert "me:key" not in str(error.value)


def test_the_stand_in_judge_looks_at_the_pictures():
    """What the documented tour is told by it: a right edit, none, one without the object, a noisy one."""
    source, target = pictures()
    empty = np.full_like(source, 190)
    noisy = np.clip(target + np.random.default_rng(0).normal(0, 40, target.shape), 0, 255).astype(np.uint8)
    with FakeServer() as server:
        client = Chat(Endpoint(server.url, "m", **QUICK), None)

        def score(*shown):
            return min(parse_json(client.ask(['Answer {"score": [a, b]}.', *shown], "v"))["score"])
        assert score(source, target) >= 7 and score(source, source) == 0 and score(source, empty) <= 2
        assert score(target) >= 8 and score(source) >= 8 and score(noisy) <= 3
