"""Client of an OpenAI-compatible /chat/completions endpoint (vLLM, SGLang, OpenAI, ...), by the standard library alone.

In: texts and uint8 pictures (H, W, 3); out: the answer's text. The instruction writer and the judge both ask through
`Chat`. Every completed answer goes into an append-only cache keyed by content, so that a run which was stopped or
killed resumes and nothing is paid for twice. spec: https://platform.openai.com/docs/api-reference/chat
"""

import argparse
import base64
import email.utils
import hashlib
import http.client
import io
import json
import os
import queue
import random
import re
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image


TOKEN_FIELDS = ("max_tokens", "max_completion_tokens")
LONGEST_WAIT = 600.0  # seconds; a server which asks for more counts as failed


class ChatError(RuntimeError):
    """No answer after all retries; the next call may succeed. The caller counts it as failed."""


class ChatRefused(ValueError):
    """The endpoint will not answer any call (wrong key, model, address or fields): the run stops."""


@dataclass(frozen=True)
class Endpoint:
    """Where and how to ask. ValueError for values no server can take."""

    url: str  # up to and including /v1
    model: str
    key_env: str = "OPENAI_API_KEY"  # environment variable with the key; unset: "EMPTY", which local servers take
    token_field: str = "max_tokens"  # the GPT-5 family wants max_completion_tokens, which includes its reasoning
    max_tokens: int = 512
    temperature: float | None = 0.0  # None: not sent, for models that refuse it
    timeout: float = 120.0  # seconds without a byte from the server
    retries: int = 5  # after the first try, of HTTP failures
    backoff: float = 1.0  # seconds before the first retry, doubled each time, less up to half by chance

    def __post_init__(self):
        if not re.fullmatch(r"https?://[^/?#@\s]+(/[^?#@\s]*)?", self.url):
            shown = re.sub(r"(//|[?#]).*(@|$)", r"\1***\2", self.url)  # there may be a key in it
            raise ValueError(f"Expected --url like http://localhost:8000/v1 (a key goes into ${self.key_env}), found {shown!r}.")
        if self.token_field not in TOKEN_FIELDS:
            raise ValueError(f"Expected --token-field {' or '.join(TOKEN_FIELDS)}, found {self.token_field!r}.")
        if self.max_tokens < 1 or self.timeout <= 0 or self.retries < 0:
            raise ValueError("--max-tokens and --timeout must be above 0, retries at least 0.")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would carry the key on to wherever a redirect points."""

    def redirect_request(self, *_):
        return None


OPENER = urllib.request.build_opener(_NoRedirect)


def data_url(picture: np.ndarray) -> str:
    """A uint8 picture (H, W, 3) as a PNG data URL; PNG, because JPEG shifts the colours that texts refer to."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def picture_hash(picture: np.ndarray) -> str:
    """Of shape and pixels, not of the PNG, whose bytes differ between versions of zlib."""
    return hashlib.sha256(repr((picture.shape, str(picture.dtype))).encode() + picture.tobytes()).hexdigest()


class Chat:
    """Asks one endpoint; any number of threads may share it.

    cache: JSON lines file, one line per completed answer, usable or not; None: remembered in memory only.
    counts: asked (answered by the server), from_cache, failed, retries, seconds (summed over calls) and the tokens the
    server reported.
    """

    def __init__(self, endpoint: Endpoint, cache: str | Path | None):
        self.endpoint, self.cache = endpoint, Path(cache) if cache else None
        self.counts = {"asked": 0, "from_cache": 0, "failed": 0, "retries": 0, "seconds": 0.0,
                       "prompt_tokens": 0, "completion_tokens": 0}
        self._api_key = os.environ.get(endpoint.key_env, "").strip() or "EMPTY"
        if not re.fullmatch("[!-~]+", self._api_key):  # urllib's own error would print it
            raise ValueError(f"The key in ${endpoint.key_env} has spaces or other characters that no HTTP header takes.")
        self._lock, self._stop, self._refusal = threading.Lock(), threading.Event(), ""
        self._answers, self._under_way, self._file = {}, {}, None
        if self.cache and self.cache.exists():
            for line in self.cache.read_bytes().splitlines():
                try:
                    record = json.loads(line)
                    self._answers[record["key"]] = record["answer"]
                except (ValueError, LookupError, TypeError):
                    pass  # torn by a kill in the middle of writing: that answer is asked for again

    def body(self, parts: list, images_first: bool = False, picture=data_url) -> bytes:
        """The request of `parts` (texts and pictures in order; pictures before all texts if images_first) as JSON."""
        parts = sorted(parts, key=lambda part: isinstance(part, str)) if images_first else parts
        content = [{"type": "text", "text": part} if isinstance(part, str)
                   else {"type": "image_url", "image_url": {"url": picture(part)}} for part in parts]
        fields = {"model": self.endpoint.model, self.endpoint.token_field: self.endpoint.max_tokens}
        if self.endpoint.temperature is not None:
            fields["temperature"] = self.endpoint.temperature
        return json.dumps(fields | {"messages": [{"role": "user", "content": content}]}).encode()

    def key(self, parts: list, version: str, attempt: int = 0, images_first: bool = False) -> str:
        """sha256 of the request, each picture replaced by the hash of its pixels, of the prompt's version and attempt."""
        request = self.body(parts, images_first, picture_hash)
        return hashlib.sha256(request + json.dumps([version, attempt]).encode()).hexdigest()

    def known(self, parts: list, version: str, attempt: int = 0, images_first: bool = False) -> str | None:
        """The cached answer, None if there is none; sends nothing."""
        return self._answers.get(self.key(parts, version, attempt, images_first))

    def ask(self, parts: list, version: str, attempt: int = 0, images_first: bool = False) -> str:
        """The answer's text ("" if the model spent its tokens on reasoning), from the cache if it was ever given.

        attempt: a higher number asks the same again. ChatError after the last retry; ChatRefused when retrying is
        useless; OSError if the cache cannot be written.
        """
        key = self.key(parts, version, attempt, images_first)
        with self._lock:
            if key in self._answers:
                self.counts["from_cache"] += 1
                return self._answers[key]
            mine = key not in self._under_way
            future = self._under_way.setdefault(key, Future())
        if not mine:  # another thread has sent this very request
            answer = future.result()
            with self._lock:
                self.counts["from_cache"] += 1
            return answer
        try:
            self._append(b"")  # an unwritable cache is found before anything is paid for
            start = time.time()
            answer, finish, usage = self._send(self.body(parts, images_first))
            seconds = time.time() - start
            record = {"key": key, "model": self.endpoint.model, "version": version, "attempt": attempt,
                      "pictures": [picture_hash(part) for part in parts if not isinstance(part, str)],
                      "answer": answer, "finish": finish, "usage": usage, "seconds": round(seconds, 3)}
            self._append(json.dumps(record).encode() + b"\n")
            with self._lock:
                self._answers[key] = answer
                self.counts["asked"] += 1
                self.counts["seconds"] += seconds
                for name in ("prompt_tokens", "completion_tokens"):
                    self.counts[name] += usage.get(name) or 0
            future.set_result(answer)
            return answer
        except BaseException as error:
            with self._lock:
                self.counts["failed"] += isinstance(error, ChatError)
            future.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._under_way[key]

    def _append(self, line: bytes) -> None:
        """One unbuffered write in append mode per line: neither a kill nor a second run leaves more than a torn end."""
        if self.cache is None:
            return
        with self._lock:
            if self._file is None:
                self.cache.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(self.cache, "a+b", buffering=0)
                if self._file.seek(0, os.SEEK_END):
                    self._file.seek(-1, os.SEEK_END)
                    self._file.write(b"" if self._file.read(1) == b"\n" else b"\n")  # ends a torn line
            if line:
                if self._file.write(line) != len(line):
                    raise OSError(f"The disk of {self.cache} is full; make room and run again.")
                os.fsync(self._file.fileno())

    def _send(self, body: bytes) -> tuple[str, str, dict]:
        """Posts until answered: (text, finish_reason, usage)."""
        end = self.endpoint
        request = urllib.request.Request(end.url.rstrip("/") + "/chat/completions", body, {
            "Content-Type": "application/json", "Authorization": f"Bearer {self._api_key}"})
        for attempt in range(end.retries + 1):
            if self._stop.is_set():
                raise ChatRefused(self._refusal)
            wait = end.backoff * 2**attempt * random.uniform(0.5, 1)
            try:
                with OPENER.open(request, timeout=end.timeout) as reply:
                    data = json.loads(reply.read())
                choice = data["choices"][0]
                text = choice["message"].get("content") or ""
                if isinstance(text, list):  # some servers answer in parts
                    text = "".join(part.get("text", "") for part in text)
                return text, choice.get("finish_reason") or "", data.get("usage") or {}
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code}: {self._message(error)}"
                if not (error.code in (408, 429) or error.code >= 500) or "insufficient_quota" in reason:
                    self._refuse(f"{end.url} refused the call for {end.model}, {reason} "
                                 f"Check --url, --model, --token-field, --temperature and the key in ${end.key_env}.")
                wait = max(wait, retry_after(error.headers.get("Retry-After")))
            except (OSError, http.client.HTTPException) as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
                if isinstance(getattr(error, "reason", 0), ConnectionRefusedError) and not self.counts["asked"]:
                    self._refuse(f"Nothing listens at {end.url}; start the server there or give another --url.")
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                reason = f"the reply is no chat completion ({type(error).__name__}: {error})"
            if attempt == end.retries or wait > LONGEST_WAIT:
                raise ChatError(f"No answer of {end.url} in {attempt + 1} tries; the last: {reason}")
            with self._lock:
                self.counts["retries"] += 1
            self._stop.wait(wait)

    def _message(self, error: urllib.error.HTTPError) -> str:
        """What the server says, without the key, which some servers echo."""
        text = str(error.reason)
        try:
            text = error.read().decode(errors="replace") or text
            found = json.loads(text)
            found = found.get("error", found)
            text = f"{found.get('message')} {found.get('code') or ''}"
        except (OSError, http.client.HTTPException, ValueError, AttributeError):
            pass  # no JSON of the usual form: as it came
        return (text if self._api_key == "EMPTY" else text.replace(self._api_key, "***")).strip()[:500].rstrip(".") + "."

    def _refuse(self, sentence: str) -> None:
        self._refusal = sentence
        self._stop.set()  # calls that wait to retry end now
        raise ChatRefused(sentence)


def retry_after(value: str | None) -> float:
    """Seconds to wait by a Retry-After header: a number or an HTTP date; 0 without one."""
    try:
        return max(0.0, float(value))
    except (TypeError, ValueError):
        date = email.utils.parsedate_to_datetime(value) if value and email.utils.parsedate(value) else None
        return max(0.0, date.timestamp() - time.time()) if date else 0.0


def run(jobs, work, threads: int, label: str) -> list:
    """[work(job) for job in jobs] by a pool of threads, in order, with a progress line on stderr.

    An exception in `work` or Ctrl-C stops it: no job is begun any more, calls under way are waited for, so that their
    answers reach the cache (a second Ctrl-C leaves at once), and the exception is raised.
    """
    jobs = list(jobs)
    todo, done, stop, start = queue.SimpleQueue(), queue.Queue(), threading.Event(), time.time()
    results, shown, pause = [None] * len(jobs), 0.0, 0.2 if sys.stderr.isatty() else 5.0

    def worker():
        while not stop.is_set():
            try:
                index = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((index, work(jobs[index]), None))
            except BaseException as error:
                done.put((index, None, error))

    for index in range(len(jobs)):
        todo.put(index)
    pool = [threading.Thread(target=worker, daemon=True) for _ in range(min(threads, len(jobs)))]
    try:
        for thread in pool:
            thread.start()
        for count in range(1, len(jobs) + 1):
            index, results[index], error = done.get()
            if error:
                raise error
            if time.time() - shown > pause or count == len(jobs):
                shown = time.time()
                left = (shown - start) / count * (len(jobs) - count)
                print(f"\r{label}: {count}/{len(jobs)}, {left / 60:.1f} min left ", end="", file=sys.stderr, flush=True)
    except BaseException as error:
        stop.set()
        if isinstance(error, KeyboardInterrupt):
            print("\nWaiting for the calls under way; Ctrl-C again leaves at once.", file=sys.stderr)
        for thread in pool:
            if thread.is_alive():
                thread.join()
        raise
    finally:
        if shown:
            print(file=sys.stderr)
    return results


# Shared flags


def add_arguments(parser: argparse.ArgumentParser, model: str | None = None, max_tokens: int = 512,
                  temperature: float | None = 0.0) -> None:
    """The flags of every command that asks a model; the defaults of the last three are the caller's."""
    group = parser.add_argument_group("endpoint (OpenAI-compatible)")
    group.add_argument("--url", help="for example http://localhost:8000/v1")
    group.add_argument("--model", default=model, help="the server's name of the model" + (f"; default: {model}" if model else ""))
    group.add_argument("--key-env", default="OPENAI_API_KEY", help="environment variable that holds the key")
    group.add_argument("--token-field", choices=TOKEN_FIELDS, default="max_tokens", help="GPT-5 family: the second")
    group.add_argument("--max-tokens", type=int, default=max_tokens, help="GPT-5 family: 2000 or more, reasoning counts")
    group.add_argument("--temperature", default="omit" if temperature is None else str(temperature),
                       help="a number, or omit (GPT-5 family)")
    group.add_argument("--threads", type=int, default=16, help="calls at once")
    group.add_argument("--timeout", type=float, default=120.0, help="seconds")
    group.add_argument("--cache", type=Path, help="JSON lines file of all answers, by which a run resumes; default: beside the output")
    group.add_argument("--dry-run", action="store_true", help="say what would be asked; send nothing")


def endpoint_of(args: argparse.Namespace) -> Endpoint:
    """The endpoint that the flags describe; ValueError with a sentence for what is missing or wrong."""
    for flag in ("url", "model"):
        if not getattr(args, flag):
            raise ValueError(f"Expected --{flag} of an OpenAI-compatible endpoint, found none.")
    if args.threads < 1:
        raise ValueError(f"--threads must be at least 1, not {args.threads}.")
    try:
        temperature = None if args.temperature == "omit" else float(args.temperature)
    except ValueError:
        raise ValueError(f"Expected --temperature as a number or omit, found {args.temperature!r}.") from None
    return Endpoint(args.url, args.model, args.key_env, args.token_field, args.max_tokens, temperature, args.timeout)
