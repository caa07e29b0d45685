"""Pages as text: what is on them, that nothing of the data is taken for markup, and that they load nothing."""

import base64
import hashlib
import json
from html.parser import HTMLParser
from typing import Any

import pytest
import torch

from e2e_sae.analysis.feature_data import N_BINS
from e2e_sae.analysis.feature_html import feature_page, histogram, index_page, json_for_html, overview_page
from tests.analysis.tiny_features import HOSTILE, TEXTS, tiny_features, tiny_other

LOADING = {"src", "srcset", "data", "action", "background", "poster", "ping", "formaction", "manifest"}


class Page(HTMLParser):
    """Elements with their attributes, and the text of each."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, Any]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "input", "img", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self._open[-1] if self._open else "", data))

    def of(self, tag: str, **wanted: str) -> list[dict[str, Any]]:
        return [a for name, a in self.elements if name == tag and wanted.items() <= a.items()]

    def text_of(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]


def pages() -> dict[str, str]:
    a, b = tiny_features("A"), tiny_features("B", seed=1)
    return {
        "feature": feature_page(a, 1, TEXTS, tiny_other(b)),
        "alone": feature_page(tiny_features(), 0, TEXTS, None),
        "dead": feature_page(a, 4, TEXTS, None),
        "index": index_page(a, TEXTS, tiny_other(b), [a, b]),
        "overview": overview_page([a, b], [tiny_other(b), None]),
    }


@pytest.mark.parametrize("name", ["feature", "alone", "dead", "index", "overview"])
def test_pages_load_nothing_and_run_only_what_their_policy_names(name: str):
    page = Page(pages()[name])
    for tag, attributes in page.elements:
        assert not LOADING & attributes.keys(), (tag, attributes)
        assert not [key for key in attributes if key.startswith("on") or key == "style"], (tag, attributes)
        assert "://" not in attributes.get("href", "")
    assert not page.of("link")
    (policy,) = [a["content"] for a in page.of("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    scripts = [a for a in page.of("script") if a.get("type") != "application/json"]
    assert len(scripts) == (name != "overview")
    for tag in ("style", "script"):
        for text in page.text_of(tag)[-1:]:
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            assert f"'sha256-{digest}'" in policy


@pytest.mark.parametrize("name", ["feature", "index"])
def test_whatever_tokens_say_is_text(name: str):
    page = Page(pages()[name])
    assert not page.of("img")
    n_scripts = 2 if name == "index" else 1
    assert len(page.of("script")) == n_scripts
    assert "window.pwned" in "".join(text for _, text in page.texts)


def test_the_index_holds_every_page_with_its_text_as_it_is():
    features = tiny_features("A")
    page = Page(index_page(features, TEXTS, tiny_other(tiny_features("B")), [features]))
    data = json.loads(page.text_of("script")[0])
    assert [latent["n"] for latent in data["latents"]] == [0, 2, 4, 6, 8]
    latent = data["latents"][1]
    assert (latent["tokens"], latent["frequency"], latent["largest"], latent["kl"]) == ([" class"], 0.2, 3.5, 0.05)
    assert (latent["here"], latent["other"]) == (0.89, 0.25)
    before, token, _ = latent["contexts"][0]
    assert token == " class"
    assert any(text in before for text in HOSTILE)
    assert latent["promoted"] == TEXTS[1:7]
    dead = data["latents"][4]
    assert (dead["tokens"], dead["contexts"], dead["kl"]) == ([], [], None)


def test_a_page_shows_its_latent_and_links_to_those_that_have_pages():
    page = Page(pages()["feature"])
    text = "".join(text for _, text in page.texts)
    assert "Latent 2" in page.text_of("h1")
    assert "20 of 100 tokens" in text
    links = {a["href"]: a.get("rel") for a in page.of("a")}
    assert links == {
        "../index.html": "index",
        "0.html": "prev",
        "4.html": "next",
        "../latents/2.html": None,
        "../latents/4.html": None,  # 7 is near too, and has no page
        "../../B-blocks-1-hook_resid_pre/latents/6.html": None,
    }
    assert page.text_of("li").count("7 ") == 1
    marks = page.of("mark")
    places = [a for a in marks if a["class"].endswith(" at")]
    assert len(places) == 45
    # The strongest of 4 out of a largest of 3.5: never more than the last shade.
    assert places[0] == {"class": "s9 at", "title": "4 · token 8"}
    assert {a["class"] for a in marks if not a["class"].endswith(" at")} == {"s2"}  # 0.5 of 3.5, rounded up


def test_the_sample_is_shown_in_groups_of_equally_many_strongest_first():
    page = Page(pages()["feature"])
    bounds = [tuple(map(float, text.split(" to "))) for text in page.text_of("h3") if " to " in text]
    acts = [float(f"{x:.3g}") for x in torch.linspace(4, 1, 45)[20:]]
    assert bounds == [(acts[i + 4], acts[i]) for i in range(0, 25, 5)]


def test_a_dead_latent_has_a_page_without_contexts():
    page = Page(pages()["dead"])
    assert "Never active in 100 tokens." in page.text_of("p")
    assert not page.of("mark")


def test_characters_that_cannot_be_seen_are_shown():
    shown = "".join(text for _, text in Page(pages()["feature"]).texts)
    assert "↵⇥\\u202e\\u2028\\x00" in shown
    assert "\u202e" not in shown
    assert "\x00" not in shown


def test_bars_have_the_heights_of_their_counts():
    counts = torch.zeros(N_BINS, dtype=torch.int64)
    counts[40], counts[42] = 10, 5
    drawn = histogram(counts)
    assert drawn is not None
    assert drawn["most"] == 10
    assert [(bar["x"], bar["width"], bar["height"]) for bar in drawn["bars"]] == [(0, 1 / 3, 1), (2 / 3, 1 / 3, 0.5)]
    assert [bar["title"] for bar in drawn["bars"]] == ["1 to 1.26: 10", "1.58 to 2: 5"]
    assert [(tick["x"], tick["text"]) for tick in drawn["ticks"]] == [
        (0, "1"),
        (1 / 3, "1.3"),
        (2 / 3, "1.6"),
        (1, "2"),
    ]
    assert histogram(torch.zeros(N_BINS, dtype=torch.int64)) is None


def test_json_keeps_its_values_and_cannot_end_its_script():
    value = {"text": [*HOSTILE, "<!--", "&lt;", "é"], "n": None}
    text = json_for_html(value)
    assert json.loads(text) == value
    assert not set("<>&") & set(text)
    assert text.isascii()
