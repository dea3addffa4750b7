"""Reads the JSON in a language model's answer, however it is wrapped.

In: the answer's text; out: a Python object, or ValueError with the reason, so that the caller can ask again. VIEScore's
release replaces what it cannot read by random numbers; nothing here guesses.
"""

import ast
import json
import re

STRING = re.compile(r'("(?:\\.|[^"\\])*")', re.DOTALL)


def _no_constant(name: str):
    raise ValueError(f"{name} is no number")


def _decode(text: str) -> object:
    """One bracketed span as JSON; else with bare keys quoted and trailing commas dropped; else as a Python literal."""
    pieces = STRING.split(text)  # strings at the odd places stay as they are
    pieces[::2] = [re.sub(r",(\s*)(?=[}\]])", r"\1", re.sub(r"([{,]\s*)([A-Za-z_]\w*)(\s*:)", r'\1"\2"\3', piece))
                   for piece in pieces[::2]]
    for candidate in (text, "".join(pieces)):
        try:
            return json.loads(candidate, strict=False, parse_constant=_no_constant)
        except ValueError as error:
            reason = error
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise reason from None


def parse_json(text: str) -> object:
    """The JSON object in a model's answer; without one, the list; a number if the answer is nothing else.

    Tolerates reasoning in <think> tags, fences, text around, VIEScore's ||V^=^V|| delimiters, bare keys, trailing
    commas and single quotes. Of several objects the last counts. ValueError with the reason if there is none or it is
    cut off: half an answer is not guessed at.
    """
    text = text.rpartition("</think>")[2].strip()
    if text.startswith("<think>") or not text:
        raise ValueError("the answer is empty or ends within its reasoning: the token budget is too small")
    pieces = text.split("||V^=^V||")
    text = pieces[1].strip() if len(pieces) == 3 else text
    if re.fullmatch(r"[-+]?\d+(\.\d+)?", text):
        return json.loads(text.lstrip("+"))
    found, reason, position = [], "it holds no JSON object", 0
    while opening := re.compile(r"[{\[]").search(text, position):
        depth, quoted, end = 0, False, None
        for mark in re.compile(r'\\.|["{}\[\]]', re.DOTALL).finditer(text, opening.start()):
            quoted ^= mark[0] == '"'
            depth += 0 if quoted else (mark[0] in "{[") - (mark[0] in "}]")
            if not depth and not quoted:
                end = mark.end()
                break
        if end is None:
            raise ValueError("its JSON is cut off or its brackets do not match")
        try:
            found.append(_decode(text[opening.start():end]))
        except ValueError as error:
            reason = f"its JSON is broken ({error})"
        position = end
    if not found:
        raise ValueError(reason)
    return ([value for value in found if isinstance(value, dict)] or found)[-1]
