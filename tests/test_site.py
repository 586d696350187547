# SPDX-License-Identifier: Apache-2.0
"""The site builds without a warning, its links lead somewhere, and a browser shows its pages."""

import functools
import http.server
import importlib.util
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


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def served(site):
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def browser():
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium with its driver here: the pages were not opened")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=driver)
    found = webdriver.Chrome(options=options, service=service)
    yield found
    found.quit()


SEEN = """return {
    title: document.querySelector('h1')?.innerText ?? '',
    wide: document.documentElement.scrollWidth - window.innerWidth,
    broken: [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src),
}"""


@pytest.mark.thorough
@pytest.mark.parametrize("screen", SCREENS)
def test_a_browser_shows_every_page(site, served, browser, screen):
    """No error in its console, no missing picture, nothing that sticks out at the side."""
    width, height = SCREENS[screen]
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    for page in pages(site):
        place = page.relative_to(site).as_posix()
        browser.get(f"{served}/{place}")
        seen = browser.execute_script(SEEN)
        assert seen["title"], place
        assert seen["broken"] == [], place
        assert seen["wide"] <= 0, place
        assert browser.get_log("browser") == [], place
