"""What the tests of the HTML pages share: rules of accessibility on the markup, and a real browser without a window.

`problems` reads a page's markup, `contrasts` its colours. `Browser` drives Chromium by its DevTools protocol with the
standard library alone; `chromium` is None where there is no such browser, and the tests that need it are skipped.
"""

import base64
import html.parser
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import time
import urllib.request

import pytest

chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(chromium is None, reason="no Chromium here (Debian: apt-get install chromium)")

VOID = {"meta", "img", "input", "br", "hr", "link", "rect", "line"}
CONTROLS = {"button", "textarea", "select", "progress", "a"}


class Node:
    def __init__(self, tag, attrs, parent):
        self.tag, self.attrs, self.parent, self.children = tag, dict(attrs), parent, []

    def all(self, *tags):
        for child in self.children:
            if isinstance(child, Node):
                if not tags or child.tag in tags:
                    yield child
                yield from child.all(*tags)

    def text(self):
        """Text content, pictures by their alt, without what is hidden from screen readers, scripts and styles."""
        if self.tag in ("script", "style") or self.attrs.get("aria-hidden") == "true":
            return ""
        inner = " ".join(child if isinstance(child, str) else child.text() for child in self.children)
        return (self.attrs.get("alt", "") + inner).strip()


class Reader(html.parser.HTMLParser):
    def __init__(self, source):
        super().__init__()
        self.root = self.at = Node("root", [], None)
        self.broken = []
        self.feed(source)
        if self.at is not self.root:
            self.broken.append(f"<{self.at.tag}> is never closed")

    def handle_starttag(self, tag, attrs, closed=False):
        names = [name for name, _ in attrs]
        if len(set(names)) < len(names):
            self.broken.append(f"<{tag}> has an attribute twice")
        node = Node(tag, attrs, self.at)
        self.at.children.append(node)
        if tag not in VOID and not closed:
            self.at = node

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs, closed=True)

    def handle_endtag(self, tag):
        if tag != self.at.tag:
            self.broken.append(f"</{tag}> closes <{self.at.tag}>")
        else:
            self.at = self.at.parent

    def handle_data(self, data):
        self.at.children.append(data)


def read(source):
    return Reader(source).root


def problems(source):
    """Sentences about what is wrong with a page's markup; an empty list is a pass."""
    reader = Reader(source)
    root, found = reader.root, list(reader.broken)
    nodes = list(root.all())
    ids = [node.attrs["id"] for node in nodes if "id" in node.attrs]
    found += [f"id {name} occurs twice" for name in set(ids) if ids.count(name) > 1]
    named = {node.attrs.get("id"): node for node in nodes}
    labelled = {node.attrs.get("for") for node in root.all("label") if node.text()}

    def name(node):
        by = [named[i].text() for i in node.attrs.get("aria-labelledby", "").split() if i in named]
        ancestor = node.parent
        while ancestor and ancestor.tag != "label":
            ancestor = ancestor.parent
        return node.attrs.get("aria-label") or " ".join(by) or node.attrs.get("id") in labelled or (
            ancestor.text() if ancestor and node.tag == "input" else node.text() if node.tag != "progress" else "")

    for node in nodes:
        a, what = node.attrs, f"<{node.tag} {node.attrs}>"
        for attribute in ("aria-labelledby", "aria-describedby", "for"):
            found += [f"{what}: no id {i}" for i in a.get(attribute, "").split() if i not in named]
        if node.tag == "img" and not (a.get("alt", "").strip() and a.get("src", "").startswith("data:image/")):
            found.append(f"{what[:200]} has no alt text or is not embedded")
        if (node.tag in CONTROLS or node.tag == "input" and a.get("type") != "hidden") and not name(node):
            found.append(f"{what} has no label")
        if node.tag in ("dialog", "section") or a.get("role") in ("region", "group"):
            if not (name(node) if node.tag != "section" else node.text()) or node.tag == "dialog" and "aria-labelledby" not in a:
                found.append(f"{what} has no name")
        if a.get("role") in ("region", "group") and not ("aria-label" in a or "aria-labelledby" in a):
            found.append(f"{what} has a role, but no name")
        if int(a.get("tabindex") or 0) > 0:
            found.append(f"{what} changes the order of focus")
        if node.tag == "fieldset" and not any(child.text() for child in node.all("legend")):
            found.append(f"{what} has no legend")
        if node.tag == "svg" and a.get("aria-hidden") != "true" and not (a.get("role") == "img" and a.get("aria-label")):
            found.append(f"{what} has no text alternative")
        if node.tag == "table" and not any(child.text() for child in node.all("caption")):
            found.append(f"{what} has no caption")
        if node.tag == "th" and a.get("scope") not in ("col", "row", "colgroup", "rowgroup"):
            found.append(f"{what} has no scope")
        if any(name.startswith("on") for name in a):
            found.append(f"{what} has a script in an attribute")
        if node.tag in ("link", "iframe", "object", "base", "embed") or node.tag == "script" and "src" in a:
            found.append(f"{what} loads something")
    levels = [int(node.tag[1]) for node in nodes if re.fullmatch("h[1-6]", node.tag)]
    if levels.count(1) != 1 or levels[0] != 1 or any(b > a + 1 for a, b in zip(levels, levels[1:])):
        found.append(f"heading levels {levels}")
    lang, title = [node.attrs.get("lang") for node in root.all("html")], [node.text() for node in root.all("title")]
    if lang != ["en"] or len(title) != 1 or not title[0]:
        found.append(f"language {lang}, title {title}")
    return found


def luminance(colour):
    """Relative luminance of WCAG 2 of (r, g, b), 0..255."""
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in colour))
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrasts(source, pairs):
    """{(theme, text, ground): ratio} of pairs of custom properties in the page's light and dark theme."""
    themes = re.findall(r":root\{(.*?)\}", source, re.DOTALL)
    assert len(themes) == 2 and "prefers-color-scheme:dark" in source, "expected a light and a dark :root"
    result = {}
    for theme, block in zip(("light", "dark"), themes):
        colours = {name: tuple(bytes.fromhex(value)) for name, value in re.findall(r"--([\w-]+):#([0-9a-f]{6})", block)}
        for text, ground in pairs:
            high, low = sorted((luminance(colours[text]), luminance(colours[ground])), reverse=True)
            result[theme, text, ground] = (high + 0.05) / (low + 0.05)
    return result


# Of every piece of text on show: its contrast with the nearest opaque ground behind it, WCAG 2.
LOW_CONTRAST = """(() => {
  const parse = c => c.match(/[\\d.]+/g).map(Number);
  const light = c => { const [r, g, b] = parse(c).map(x => (x /= 255) <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
                       return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const low = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let seen = 0;
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !element.checkVisibility() || element.closest('script,style,.vh,textarea')) continue;
    let ground = element;
    while (ground && (parse(getComputedStyle(ground).backgroundColor)[3] ?? 1) === 0) ground = ground.parentElement;
    const style = getComputedStyle(element), colour = element.closest('svg') ? style.fill : style.color;
    const [a, b] = [light(colour), light(ground ? getComputedStyle(ground).backgroundColor : 'rgb(255, 255, 255)')];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    seen++;
    if (ratio < 4.5) low.push(`${walker.currentNode.textContent.trim().slice(0, 40)}: ${ratio.toFixed(2)}`);
  }
  return {seen, low};
})()"""

KEYS = {"Enter": ("\r", 13), " ": (" ", 32), "Tab": (None, 9), "Escape": (None, 27), "ArrowLeft": (None, 37), "ArrowUp": (None, 38),
        "ArrowRight": (None, 39), "ArrowDown": (None, 40), "Backspace": (None, 8)}


class Browser:
    """Chromium with a profile folder of its own; `Browser(folder)` with the same folder is the same user again."""

    def __init__(self, folder):
        self.folder = folder / "profile"
        port_file = self.folder / "DevToolsActivePort"
        port_file.unlink(missing_ok=True)
        self.process = subprocess.Popen(
            [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--remote-debugging-port=0", "--remote-allow-origins=*",
             f"--user-data-dir={self.folder}", "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.time() + 60
        while not (port_file.exists() and port_file.read_text().count("\n")):
            if time.time() > deadline or self.process.poll() is not None:
                raise RuntimeError("Chromium did not start.")
            time.sleep(0.05)
        port = int(port_file.read_text().split()[0])
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
            target = next(t for t in json.load(answer) if t["type"] == "page")
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        key = base64.b64encode(os.urandom(16)).decode()
        self.socket.sendall(f"GET /{target['webSocketDebuggerUrl'].split('/', 3)[3]} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
                            "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
                            f"Sec-WebSocket-Key: {key}\r\n\r\n".encode())
        self.stream = self.socket.makefile("rb")
        assert b" 101 " in self.stream.readline()
        while self.stream.readline().strip():
            pass
        self.count, self.events = 0, []
        for domain in ("Page", "Runtime", "Network"):
            self.call(f"{domain}.enable")

    def receive(self):
        message = b""
        while True:
            first, second = self.stream.read(2)
            size = second & 127
            size = struct.unpack(">H" if size == 126 else ">Q", self.stream.read(2 if size == 126 else 8))[0] if size > 125 else size
            message += self.stream.read(size)
            if first & 128:
                return json.loads(message)

    def call(self, method, **params):
        self.count += 1
        content, mask = json.dumps({"id": self.count, "method": method, "params": params}).encode(), os.urandom(4)
        size = bytes([128 | len(content)]) if len(content) < 126 else b"\xfe" + struct.pack(">H", len(content))
        self.socket.sendall(b"\x81" + size + mask + bytes(b ^ mask[i % 4] for i, b in enumerate(content)))
        while True:
            message = self.receive()
            if message.get("id") == self.count:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
            self.events.append(message)

    def open(self, url):
        self.call("Page.navigate", url=url)
        self.wait(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def js(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, condition, seconds=20):
        deadline = time.time() + seconds
        while True:
            try:
                if self.js(condition):
                    return
            except AssertionError:  # the page is just being exchanged for another
                pass
            assert time.time() < deadline, f"never true: {condition}"
            time.sleep(0.02)

    def key(self, name, shift=False):
        text, code = KEYS.get(name, (name, ord(name.upper()[0])))
        event = {"key": name, "code": name if len(name) > 1 else "", "windowsVirtualKeyCode": code, "modifiers": 8 * shift}
        self.call("Input.dispatchKeyEvent", type="keyDown", **event, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def middle(self, selector):
        return self.js(f"""(() => {{ const e = document.querySelector({json.dumps(selector)});
            e.scrollIntoView({{block: 'center', behavior: 'instant'}}); const r = e.getBoundingClientRect();
            return [r.x + r.width / 2, r.y + r.height / 2]; }})()""")

    def click(self, selector):
        x, y = self.middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def tap(self, selector):
        x, y = self.middle(selector)
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def screen(self, width, height, phone=False, dark=False):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def picture(self, path, whole=True):
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def requests(self):
        """Addresses that pages asked for since the start, embedded ones excepted."""
        urls = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in urls if not url.startswith(("data:", "blob:"))]

    def errors(self):
        return [e["params"] for e in self.events if e["method"] == "Runtime.exceptionThrown"]

    def close(self):
        self.call("Browser.close")
        self.process.wait(30)
        self.stream.close()
        self.socket.close()
