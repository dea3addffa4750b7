"""A stand-in for an OpenAI-compatible endpoint, with the failures that real ones have; needs no model and no network.

    python -m tests.fake_server --port 8000 --failures 0.3 --seed 0

POST /v1/chat/completions is answered in one of two roles, told apart by the prompt: one that asks for "score" is a
VIEScore judge's (two pictures: SC, one: PQ), any other an instruction writer's. Both look at the pictures, a little.
GET /stats counts requests and complete answers by the hash of the request's body. What it writes are no model's answers.
"""

import argparse
import base64
import hashlib
import io
import json
import random
import re
import signal
import threading
import time
from collections import Counter, deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

HTTP_FAILURES = ("429", "500", "timeout", "torn")  # no answer; torn: the connection ends amid the body
ODD_ANSWERS = ("fenced", "list", "prose", "empty", "cut")  # complete replies; empty: all tokens went into reasoning
KINDS = HTTP_FAILURES + ODD_ANSWERS


class FakeServer(ThreadingHTTPServer):
    """`with FakeServer(failures=0.3) as server: ... server.url ...` on a free port.

    failures: the share of requests that fail or are answered oddly, drawn from `kinds` by seed and request number;
    script: kinds of the first requests instead (None: none; any status such as "404" too). delay: seconds per answer;
    hang: seconds until a "timeout" answers; retry_after: what a 429 says; blunders: share of instructions that are
    wrong until the prompt says so; key: others get 401. stats(): what GET /stats gives; last: the latest requests.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port=0, failures=0.0, seed=0, delay=0.0, hang=5.0, retry_after=1.0, blunders=0.2, kinds=KINDS,
                 script=(), key=None):
        super().__init__(("127.0.0.1", port), Handler)
        self.failures, self.seed, self.delay, self.hang, self.retry_after = failures, seed, delay, hang, retry_after
        self.blunders, self.kinds, self.script, self.key = blunders, kinds, script, key
        self.lock, self.asked, self.answered, self.drawn = threading.Lock(), Counter(), Counter(), Counter()
        self.last = deque(maxlen=100)  # (time, Authorization header, fields)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def draw(self, number: int) -> str | None:
        if number < len(self.script):
            return self.script[number]
        chance = random.Random(f"{self.seed} {number}")
        return chance.choice(self.kinds) if chance.random() < self.failures else None

    def stats(self) -> dict:
        with self.lock:
            return {"requests": self.asked.total(), "answered": self.answered.total(),
                    "answered_more_than_once": sum(n > 1 for n in self.answered.values()), "drawn": dict(self.drawn),
                    "bodies": {body: [n, self.answered[body]] for body, n in self.asked.items()}}  # [requests, answers]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def reply(self, status: int, data: dict, headers: dict = {}, torn: bool = False) -> None:
        payload = json.dumps(data).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(payload), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(payload[:len(payload) // 2] if torn else payload)

    def fail(self, status: int, message: str, headers: dict = {}) -> None:
        self.reply(status, {"error": {"message": message, "type": "error", "code": None}}, headers)

    def do_GET(self):
        self.reply(200, self.server.stats()) if self.path == "/stats" else self.fail(404, f"No page {self.path}.")

    def do_POST(self):
        try:
            length = int(self.headers["Content-Length"])
            raw = self.rfile.read(length)
            if len(raw) == length:  # else the client was killed while it sent: no request arrived
                self.answer(raw)
        except ConnectionError:
            pass  # the client has gone

    def answer(self, raw: bytes) -> None:
        server, digest = self.server, hashlib.sha256(raw).hexdigest()
        sender = self.headers.get("Authorization", "")
        with server.lock:
            kind = server.draw(server.asked.total())
            server.asked[digest] += 1
            server.drawn[kind or "plain"] += 1
        if self.path != "/v1/chat/completions":
            return self.fail(404, f"No page {self.path}.")
        if server.key and sender != f"Bearer {server.key}":
            return self.fail(401, f"Incorrect API key provided: {sender.removeprefix('Bearer ')}")
        try:
            fields = json.loads(raw)
            parts = fields["messages"][-1]["content"]
            text = "\n".join(part["text"] for part in parts if part["type"] == "text")
            pictures = [picture(part["image_url"]["url"]) for part in parts if part["type"] == "image_url"]
            if fields["model"].startswith("gpt-5") and ("max_tokens" in fields or fields.get("temperature", 1) != 1):
                raise ValueError("Unsupported parameter: 'max_tokens' or 'temperature' with this model.")
            content = judge(pictures) if '"score"' in text else write(pictures, text, server.blunders, digest)
        except (ValueError, LookupError, TypeError, OSError) as error:
            return self.fail(400, f"Bad request: {error}")
        server.last.append((time.time(), sender, fields))
        if kind == "429":
            return self.fail(429, "Too many requests.", {"Retry-After": server.retry_after})
        if kind and kind.isdigit():
            return self.fail(int(kind), f"Failure on purpose for {sender}", {"Location": "/stats"})  # rude: it echoes the key
        time.sleep(server.hang if kind == "timeout" else server.delay)
        finish, answer = "stop", json.dumps(content)
        if kind == "fenced":
            answer = f"```json\n{json.dumps(content, indent=1)}\n```"
        elif kind == "list":
            answer = json.dumps(content.get("score") or list(content.values()))
        elif kind == "prose":
            answer = f"Let me look closely [as asked].\n{answer}\nI hope this helps!"
        elif kind == "empty":
            finish, answer = "length", None
        elif kind == "cut":
            finish, answer = "length", answer[:len(answer) * 2 // 3]
        tokens = len(text.split()) + sum(h * w // 1024 for h, w, _ in (p.shape for p in pictures))
        self.reply(200, {
            "id": digest[:12], "object": "chat.completion", "model": fields["model"],
            "choices": [{"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": finish}],
            "usage": {"prompt_tokens": tokens, "completion_tokens": 40, "total_tokens": tokens + 40}}, torn=kind == "torn")
        if kind not in HTTP_FAILURES:
            with server.lock:
                server.answered[digest] += 1


def picture(url: str) -> np.ndarray:
    """A PNG data URL as floats (H, W, 3) in [0, 1]."""
    head, data = url.split(",", 1)
    if head != "data:image/png;base64":
        raise ValueError(f"expected a PNG data URL, found {head}")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data, validate=True))).convert("RGB")) / 255


def presence(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How much of the moved thing is at each pixel of a and of b (H, W): where they differ, the distance from the
    picture's median colour."""
    differs = np.abs(a - b).max(-1) > 0.06
    rest = np.median(a.reshape(-1, 3), 0)
    return np.abs(a - rest).sum(-1) * differs, np.abs(b - rest).sum(-1) * differs


def write(pictures: list, text: str, blunders: float, digest: str) -> dict:
    """The move from the first picture to the second, in words; `blunders` of the answers (by the body's hash) are
    wrong in a way that the checks must find."""
    a, b = pictures
    weights = presence(a, b)
    H, W = weights[0].shape
    (x0, y0), (x1, y1) = ([(w.sum(axis) * np.arange(n)).sum() / max(w.sum(), 1e-9) / n for axis, n in ((0, W), (1, H))]
                          for w in weights)
    name = re.search(r"moved object is: ([^.\n]+)", text)
    name = f"the {name[1]}" if name else "the object"
    dx, dy = x1 - x0, y1 - y0
    blunder = int(digest[:4], 16) / 65536 < blunders and "rejected" not in text
    if blunder:
        dx, dy = -dx, -dy
    if abs(dx) > abs(dy):
        relation = "right" if dx > 0 else "left"
        sentence = f"Move {name} to the {relation} across the floor."
    else:
        relation = "closer" if dy > 0 else "farther"
        sentence = f"Move {name} {relation + ' to' if dy > 0 else relation + ' away from'} the camera."
    if blunder and int(digest[4:6], 16) % 2:
        sentence = f"In the second image {name} has gone."
    return {"object": name, "relation": relation, "reference": [], "instruction": sentence}


def judge(pictures: list) -> dict:
    """SC of (source, edit): 0 for no change or a thing that vanished; PQ of (edit,): low for noise."""
    if len(pictures) == 1:
        grey = pictures[0].mean(-1)
        grain = np.median(np.abs(4 * grey[1:-1, 1:-1] - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:]))
        score = int(np.clip(round(10 - 60 * grain), 0, 10))
        return {"score": [score, score], "reasoning": f"grain {grain:.3f}"}
    source, edit = pictures
    if edit.shape != source.shape:
        raise ValueError("the pictures of a pair must have one size")
    before, after = presence(source, edit)
    changed = (np.abs(source - edit).max(-1) > 0.06).mean()
    kept = after.sum() / max(before.sum(), 1e-9)
    followed = 0 if changed < 0.001 else int(np.clip(round(9 * kept), 0, 9))
    return {"score": [followed, int(np.clip(round(11 - 20 * changed), 0, 10))], "reasoning": f"{changed:.1%} changed"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--failures", type=float, default=0.0, help="share of requests that fail or are answered oddly")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--delay", type=float, default=0.0, help="seconds per answer")
    parser.add_argument("--hang", type=float, default=5.0, help="seconds until a time-out answers; clients wait less")
    args = parser.parse_args()
    server = FakeServer(args.port, args.failures, args.seed, args.delay, args.hang)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a script in the background cannot send Ctrl-C
    print(f"Listening on {server.url}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print(json.dumps({k: v for k, v in server.stats().items() if k != "bodies"}))


if __name__ == "__main__":
    main()
