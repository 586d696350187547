# SPDX-License-Identifier: Apache-2.0
"""The site builds without a warning, its links lead somewhere, and a browser shows its pages."""

import functools
import http.server
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SCREENS = {"wide": (1280, 900), "narrow": (390, 844)}


def hook(name):
    """A module of docs/site/."""
    found = importlib.util.spec_from_file_location(name, ROOT / "docs" / "site" / f"{name}.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


class Tags(HTMLParser):
    """What a page points to, and the names within it that can be pointed to."""

    def __init__(self, text):
        super().__init__()
        self.links, self.names = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.links += [attrs[each] for each in ("href", "src") if attrs.get(each)]
        self.names |= {attrs[each] for each in ("id", "name") if attrs.get(each)}


# Cheap: what the build is made of.


def test_links_lead_to_the_places_of_the_site():
    pages = hook("pages")
    text = "[a](../README.md#which-noise) [b](memory.md) [c](../examples/wrong_gradients.py)"
    assert pages.moved(text, "docs/wrong-gradients.md") == (
        "[a](index.md#which-noise) [b](memory.md) [c](source/examples/wrong_gradients.py.md)"
    )
    text = "![p](docs/pictures/wrong-gradients.png) [d](benchmarks/README.md) [e](https://a.b/c.md)"
    assert pages.moved(text, "README.md") == (
        "![p](pictures/wrong-gradients.png) [d](benchmarks.md) [e](https://a.b/c.md)"
    )
    assert pages.moved("x[i](y) [none](gone.md)", "README.md") == "x[i](y) [none](gone.md)"


def test_docstrings_become_what_the_reference_shows():
    docstrings = hook("docstrings")
    line = "z0: [B, *state] of ``[K]`` or `[B, K]`, a[i](x), c**2"
    assert docstrings.literal(line) == (
        r"z0: `[B, *state]` of ``[K]`` or `[B, K]`, a[i](x), c\*\*2"
    )
    text = ["Args:", "    a, b: two", "        lines", "    c: one", "Returns:", "    d, e: no"]
    assert docstrings.arguments(text) == [
        "Args:",
        "    a: two",
        "        lines",
        "    b: as `a`.",
        "    c: one",
        "Returns:",
        "    d, e: no",
    ]


def entries(nav):
    for each in nav:
        for value in each.values():
            yield from [value] if isinstance(value, str) else entries(value)


def test_every_page_has_its_entry_in_the_navigation():
    """A new page wants a line in mkdocs.yml."""
    told = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    docs = ROOT / "docs"
    pages = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")}
    assert sorted(entries(told["nav"])) == sorted(pages | set(hook("pages").PLACES.values()))


# Thorough: the site itself.


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


def pages(site):
    found = sorted(path for path in site.rglob("*.html") if path.name != "404.html")
    assert len(found) > 20
    return found


@pytest.mark.thorough
def test_every_link_of_the_built_site_leads_somewhere(site):
    tags = {path: Tags(path.read_text()) for path in pages(site)}
    wrong = []
    for page, found in tags.items():
        for link in found.links:
            if re.match(r"[a-z]+:|//", link):
                continue
            path, name = urldefrag(link)
            there = (page.parent / unquote(path)).resolve() if path else page
            if not there.exists() or (name and there in tags and name not in tags[there].names):
                wrong.append((page.name, link))
    assert wrong == []


@pytest.mark.thorough
def test_no_page_asks_another_server_for_anything(site):
    for page in pages(site):
        text = page.read_text()
        fetched = re.findall(r"<(?:script|img|iframe)[^>]* src=[\"']?(https?:[^\"' >]+)", text)
        fetched += re.findall(r"<link[^>]*stylesheet[^>]* href=[\"']?(https?:[^\"' >]+)", text)
        assert fetched == [], page


WATCH = """<script>
window.seen = [];
const named = e => e.message || "not loaded: " + (e.target.src || e.target.href);
addEventListener("error", e => window.seen.push(named(e)), true);
addEventListener("unhandledrejection", e => window.seen.push(String(e.reason)));
for (const way of ["error", "warn"]) console[way] = (...told) => window.seen.push(told.join(" "));
</script>"""

WALK = """<!doctype html><title>walk</title><iframe style="border:0"></iframe><script>
const frame = document.querySelector("iframe"), found = [];
const loaded = address => new Promise(done => { frame.onload = done; frame.src = address; });
async function walk(pages, screens) {
    for (const [screen, [width, height]] of Object.entries(screens)) {
        frame.style.width = width + "px";
        frame.style.height = height + "px";
        for (const page of pages) {
            await loaded(page);
            const inside = frame.contentWindow, root = inside.document.documentElement;
            await new Promise(done => inside.requestAnimationFrame(() => setTimeout(done, 30)));
            found.push({
                page, screen, told: inside.seen,
                title: inside.document.querySelector("h1")?.innerText ?? "",
                wide: root.scrollWidth - inside.innerWidth,
                broken: [...inside.document.images].filter(i => !i.naturalWidth).map(i => i.src),
            });
        }
    }
    await fetch("/found", {method: "POST", body: JSON.stringify(found)});
}
walk(PAGES, SCREENS);
</script>"""


class Walked(http.server.SimpleHTTPRequestHandler):
    """Serves the site, each page with a script that notes its errors, and what walks over them."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        if self.path == "/walk":
            text = self.server.walk
        elif path.suffix == ".html" and path.exists():
            text = path.read_text().replace("<head>", "<head>" + WATCH, 1)
            assert WATCH in text
        else:
            return super().do_GET()
        body = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        self.server.found = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        self.server.done.set()

    def send_error(self, code, *args, **kwargs):
        self.server.refused.append((code, self.path))
        super().send_error(code, *args, **kwargs)


@pytest.fixture
def server(site):
    handler = functools.partial(Walked, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.found, server.refused, server.done = [], [], threading.Event()
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.thorough
def test_a_browser_shows_every_page(site, server, tmp_path):
    """On either screen: no error, no missing picture, nothing that sticks out at the side."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium here: the pages were not opened in a browser")
    names = [page.relative_to(site).as_posix() for page in pages(site)]
    server.walk = WALK.replace("PAGES", json.dumps(names)).replace("SCREENS", json.dumps(SCREENS))
    options = ("--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}")
    with (tmp_path / "log").open("w") as log:
        command = [chromium, *options, f"http://127.0.0.1:{server.server_port}/walk"]
        browser = subprocess.Popen(command, stdout=log, stderr=log)
        arrived = server.done.wait(timeout=300)
        browser.terminate()
        browser.wait()
    assert arrived, (tmp_path / "log").read_text()
    assert len(server.found) == len(names) * len(SCREENS)
    for seen in server.found:
        assert seen["title"], seen
        assert seen["told"] == seen["broken"] == [], seen
        assert seen["wide"] <= 0, seen
    assert [each for each in server.refused if each[1] != "/favicon.ico"] == []
