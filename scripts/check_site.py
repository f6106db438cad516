"""Looks at the built site with a real browser: `python scripts/check_site.py SITE [SCREENSHOTS]`.

Headless Chromium opens every page from a server of this process: an error on the console, a picture that does
not load, a link that leads nowhere, a block of code that is wider than its column, or a request to another
host is a fault. Five pages are kept as screenshots. Every model must be found by the site's search. Without
Chromium the browser's part is left out, and that is said.
"""

from __future__ import annotations

import functools
import html
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SHOTS = {
    "index": "",
    "install": "install/",
    "gallery": "gallery/",
    "swap": "swap/",
    "conv": "ops/causal_conv3d/",
}
SIZE = "1360,1800"
PROBE = "__check__.html"  # opens each page in a frame of its own and writes down what it finds
SCRIPT = """
const pages = PAGES, found = {};
const wait = ms => new Promise(done => setTimeout(done, ms));
const longest = text => text.split('\\n').sort((a, b) => b.length - a.length)[0];
async function look(page) {
  const frame = document.createElement('iframe');
  frame.width = 1300; frame.height = 1500;
  const loaded = new Promise(done => frame.onload = done);
  frame.src = page; document.body.append(frame);
  await loaded; await wait(150);
  const d = frame.contentDocument, faults = [];
  for (const img of d.images) img.loading = 'eager';
  await wait(100);
  for (const img of d.images)
    if (!img.complete || !img.naturalWidth) faults.push('picture ' + img.getAttribute('src'));
  for (const code of d.querySelectorAll('article pre > code'))
    if (code.scrollWidth > code.clientWidth + 1)
      faults.push('code wider than its column: ' + longest(code.innerText));
  for (const a of d.querySelectorAll('article a[href]')) {
    const to = new URL(a.href);
    if (to.origin != location.origin) continue;
    if (to.pathname == frame.contentWindow.location.pathname) {
      if (to.hash && !d.getElementById(decodeURIComponent(to.hash.slice(1)))) faults.push('link ' + to.hash);
    } else if (!(await fetch(to.pathname, {method: 'HEAD'})).ok) faults.push('link ' + to.pathname);
  }
  found[page] = faults; frame.remove();
}
(async () => {
  for (const page of pages) await look(page);
  const out = document.createElement('pre'); out.id = 'found';
  out.textContent = JSON.stringify(found); document.body.append(out);
})();
"""


class Server(http.server.SimpleHTTPRequestHandler):
    """The site, and the page that looks at all the others."""

    script = ""

    def do_GET(self) -> None:
        if urlsplit(self.path).path != f"/{PROBE}":
            return super().do_GET()
        body = f"<!doctype html><title>check</title><body><script>{self.script}</script>".encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def browser() -> str | None:
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def open_page(program: str, url: str, *options: str, dark: bool = False) -> tuple[str, list[str]]:
    """What the browser prints (with --dump-dom the page), and the faults: errors on the console and requests
    that the page made of another host."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "net.json"
        command = [
            *(program, "--headless=new", "--disable-gpu", "--hide-scrollbars", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--enable-logging=stderr"),
            *(f"--user-data-dir={folder}/profile", f"--log-net-log={log}", f"--window-size={SIZE}"),
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            *(("--no-sandbox",) if os.geteuid() == 0 else ()),
            *("--virtual-time-budget=600000", *options, url),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=500)
        said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        faults = [f"console: {line.partition('CONSOLE')[2]}" for line in said if not _is_harmless(line)]
        origin = "{0.scheme}://{0.netloc}".format(urlsplit(url))
        faults += [f"request to {other}" for other in others(log, origin)]
    return done.stdout, faults


def _is_harmless(line: str) -> bool:
    return not re.search(r"error|failed|refused|uncaught|not found", line, re.IGNORECASE)


def others(log: Path, origin: str) -> list[str]:
    """The addresses elsewhere that pages of this origin asked for."""
    try:
        found = json.loads(log.read_text())
    except ValueError:  # the browser ended before it had closed the list
        found = json.loads(log.read_text().rstrip().rstrip(",") + "]}")
    requests = (event.get("params", {}) for event in found["events"])
    wanted = {
        params["url"]
        for params in requests
        if str(params.get("initiator", "")).startswith(origin) and "url" in params
    }
    return sorted(url for url in wanted if not url.startswith((origin, "data:", "blob:")))


def look(site: Path, shots: Path | None, program: str) -> list[str]:
    """All faults that the browser finds."""
    pages = sorted(f"/{file.relative_to(site).parent.as_posix()}/".replace("/./", "/") for file in
                   site.rglob("index.html"))  # fmt: skip
    handler = type("Handler", (Server,), {"script": SCRIPT.replace("PAGES", json.dumps(pages))})
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=str(site))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = f"http://127.0.0.1:{server.server_address[1]}/"
    try:
        text, faults = open_page(program, home + PROBE, "--dump-dom")
        found = re.search(r'<pre id="found">(.*?)</pre>', text, re.DOTALL)
        if found is None:
            return [*faults, "the browser did not get through all pages"]
        for page, problems in json.loads(html.unescape(found[1])).items():
            faults += [f"{page}: {problem}" for problem in problems]
        if shots is not None:
            shots.mkdir(parents=True, exist_ok=True)
            for name, page in SHOTS.items():
                _, more = open_page(program, home + page, f"--screenshot={shots / name}.png")
                faults += [f"/{page}: {fault}" for fault in more]
            open_page(program, home, f"--screenshot={shots / 'index-dark'}.png", dark=True)
    finally:
        server.shutdown()
    return faults


def unfound(site: Path, names: list[str]) -> list[str]:
    """The models that the search does not know."""
    index = json.loads((site / "search" / "search_index.json").read_text())
    text = html.unescape(" ".join(f"{doc['title']} {doc['text']}" for doc in index["docs"]))
    text = re.sub(r"<[^>]*>", "", text)
    return [f"not found by search: {name}" for name in names if name not in text]


def models() -> list[str]:
    """What a reader may look for: our systems and configurations, the classes of other libraries."""
    from vtok_fast.commands.names import MODELS

    page = (Path(__file__).resolve().parent.parent / "docs" / "models.md").read_text()
    others = sorted(set(re.findall(r"\b(?:Autoencoder|Asymmetric)\w+", page)))
    return [name for system, configs in MODELS.items() for name in (system, *configs)] + others


def main(arguments: list[str]) -> int:
    site, shots = Path(arguments[0]), Path(arguments[1]) if len(arguments) > 1 else None
    faults, program, began = unfound(site, models()), browser(), time.perf_counter()
    if program is None:
        print("no Chromium here (apt install chromium): the check in a browser was left out")
    else:
        faults += look(site, shots, program)
    for fault in faults:
        print(fault)
    if program is not None and not faults:
        where = f"; screenshots in {shots}" if shots else ""
        print(f"the browser found no fault ({time.perf_counter() - began:.0f} s){where}")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
