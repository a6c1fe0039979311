"""The report: what its numbers say, that nothing leaves or breaks the page, and how a browser takes it."""

import re
import shutil
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import adapted, batch_for, batches_for
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file

from analysis import Adapter, adapter_of, count, observe, read_adapter
from analysis.figures import Inputs
from analysis.observations import Observations
from analysis.report import markup, report, write_report
from analysis.report.accounting import compared, shapes_of, trained_parameters

VOID = {"meta", "link", "br", "wbr", "img", "input", "hr"}
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>&amp;$\\frac$\x07'


class Page(HTMLParser):
    """What a page consists of, and whether its elements close in order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.text += data

    def all(self, tag, attribute):
        return [attrs[attribute] for name, attrs in self.elements if name == tag and attribute in attrs]

    def sentence(self, section):
        """The sentence that a section starts with."""
        return re.search(rf'<section id="{section}".*?<p class="sentence">(.*?)</p>', self.raw, re.S)[1]


def read(text):
    page = Page(text)
    page.raw = text
    return page


@pytest.fixture(scope="module")
def model():
    return adapted("bert", k=3, t=2, p=2, form="additive").eval()


@pytest.fixture(scope="module")
def observed(model):
    batches = batches_for("bert")
    for batch in batches:
        batch["domain"] = [f"domain {int(label)}" for label in batch["labels"]]
    return observe(model, batches, labels="domain", progress=False)


@pytest.fixture(scope="module")
def log():
    shares = {10: (0.9, 0.1, 0.0), 20: (0.5, 0.3, 0.2)}
    return [{"step": step, **{f"load/group_{g}": s for g, s in enumerate(row)}} for step, row in shares.items()]


@pytest.fixture(scope="module")
def whole(model, observed, log):
    return read(report(Inputs(adapter=observed.adapter, observed=observed, log=log), shapes=shapes_of(model)))


@pytest.fixture(scope="module")
def bare(model):
    return read(report(Inputs(adapter=adapter_of(model))))


def sections(page):
    return page.all("section", "id")


def test_weights_alone_tell_a_part_and_name_the_rest(bare):
    assert sections(bare) == ["configuration", "parameters", "ranks", "similarity", "core-slices", "norms", "missing"]
    assert "add --data FILE" in bare.text and "add --log trainer_state.json" in bare.text


def test_everything_is_there_with_data_and_log(whole):
    added = ["routing-0", "movement", "outputs", "load-0"]
    assert sections(whole) == ["configuration", "parameters", *added, "ranks", "similarity", "core-slices", "norms"]


def test_without_labels_or_loads_the_options_are_named(observed):
    inputs = Inputs(adapter=observed.adapter, observed=observed._replace(labels=None), log=[{"step": 1, "loss": 1.0}])
    text = read(report(inputs)).text
    assert "add --labels KEY" in text and "BalanceCallback" in text


def test_nothing_is_asked_for_from_outside(whole):
    for tag, attrs in whole.elements:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            value = attrs.get(name) or "#"
            assert value.startswith(("#", "data:")), (tag, name, value[:60])
    assert not re.search(r"url\((?!#)|@import", whole.raw)
    assert "default-src 'none'" in whole.raw


def test_the_page_is_accessible(whole):
    assert whole.all("html", "lang") == ["en"] and [tag for tag, _ in whole.elements].count("h1") == 1
    drawings = [attrs for tag, attrs in whole.elements if attrs.get("class") == "plot"]
    assert len(drawings) >= 12
    assert all(attrs["role"] == "img" and len(attrs["aria-label"]) > 40 for attrs in drawings)
    heads = [attrs for tag, attrs in whole.elements if tag == "th"]
    assert heads and all(attrs.get("scope") in ("row", "col") for attrs in heads)
    tables, captions = (sum(tag == name for tag, _ in whole.elements) for name in ("table", "caption"))
    assert tables == captions >= 8
    assert set(whole.all("nav", "aria-label")) == {"Sections"}
    anchors = [link.removeprefix("#") for link in whole.all("a", "href")]
    assert anchors == sections(whole)


def test_ids_are_unique_and_references_lead_somewhere(whole):
    ids = [attrs["id"] for _, attrs in whole.elements if "id" in attrs]
    assert len(set(ids)) == len(ids)
    used = [attrs[name][1:] for _, attrs in whole.elements for name in ("href", "xlink:href") if name in attrs]
    used = [each for each in used if not each.startswith("ata:")]
    clips = re.findall(r"url\(#([^)\"]+)\)", whole.raw)
    assert clips and set(clips) | set(used) <= set(ids)


def test_sentences_say_what_the_numbers_say(whole, model, observed):
    adapter = adapter_of(model)
    assert f"{len(adapter.layers)} layers carry 3 groups of 2 experts each, of rank 4" in whole.sentence(
        "configuration"
    )
    own = trained_parameters(adapter)["parameters"].sum()
    assert f"trains {own:,} parameters" in whole.sentence("parameters")
    counts = np.bincount(observed.routing[""].group, minlength=3)
    routing = whole.sentence("routing-0")
    assert f"Of {counts.sum()} samples, group {counts.argmax()} serves the most" in routing
    assert ("no group is unused" in routing) == bool(counts.all())
    assert "bits" in routing
    load = whole.sentence("load-0")
    assert "From step 10 to 20 the loads evened out" in load and "from 90\xa0% to 50\xa0%" in load
    assert "no group is dead" in load


def test_sentences_follow_the_numbers():
    zero = adapter_of(adapted("bert", k=2))
    zero = zero._replace(layers=tuple(layer._replace(core=layer.core * 0, shared=None) for layer in zero.layers))
    page = read(report(Inputs(adapter=zero)))
    assert "Every slice is zero" in page.sentence("core-slices") and "Every expert is zero" in page.sentence("norms")
    assert "use none of their rank" in page.sentence("ranks")
    same = adapter_of(adapted("bert", k=2, t=1, p=1))
    alike = [layer._replace(core=layer.core[:1].expand(2, -1, -1, -1)) for layer in same.layers]
    page = read(report(Inputs(adapter=same._replace(layers=tuple(alike)))))
    assert "do nearly the same: their mean cosine is 1.00" in page.sentence("similarity")


FIELDS = [
    dict(),
    dict(share_factors=True, form="additive"),
    dict(tie_factors=False, shared_expert=False, t=3, p=2),
    dict(trainable="core", share_factors=True),
    dict(form="additive", router_depth=1, pooling="mean"),
]


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("name", ["bert", "clip"])
def test_trained_parameters_are_those_that_train(name, fields):
    model = adapted(name, **fields)
    expected = sum(p.numel() for key, p in model.named_parameters() if p.requires_grad and ".tucka_" in key)
    assert trained_parameters(adapter_of(model))["parameters"].sum() == expected


@pytest.mark.parametrize("form", ["additive", "multiplicative"])
def test_methods_are_compared_on_the_same_layers(form):
    model = adapted("vit", form=form, target_modules=["fc1", "q_proj"])
    shapes, adapter = shapes_of(model), adapter_of(model)
    table = compared(adapter, shapes).set_index("method")
    assert table.loc["LoRA, r=4", "parameters"] == count(shapes, "lora", r=4).total == 2 * 4 * (64 + 72)
    assert table.loc["6 separate LoRAs, r=4", "parameters"] == 6 * count(shapes, "lora", r=4).total
    own = table.loc["TuckA (this adapter)", "parameters"]
    np.testing.assert_allclose(table["times"], table["parameters"] / own)
    without = compared(adapter, None)["method"].tolist()
    assert without == ["TuckA (this adapter)", "HRA, r=4", "OFT, block size=32"]
    text = read(report(Inputs(adapter=adapter), shapes=None)).text
    assert ("add --model" in text) == (form == "multiplicative")


def renamed(adapter, name):
    """The adapter with hostile names of itself and of its first layer."""
    first, *rest = adapter.layers
    return adapter._replace(name=name, layers=(first._replace(name=name), *rest))


def test_names_from_files_are_text_and_nothing_else(observed, log):
    adapter = renamed(observed.adapter, HOSTILE)
    adapter.config.base_model_name_or_path = HOSTILE
    first = observed.adapter.layers[0].name
    layers = {HOSTILE if name == first else name: layer for name, layer in observed.layers.items()}
    labels = np.array([HOSTILE, "$x^$", "</svg><b>"] * len(observed.labels))[: len(observed.labels)]
    hostile = Observations(adapter, layers, observed.routing, labels)
    page = read(report(Inputs(adapter=adapter, observed=hostile, log=log)))
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 1 and "img" not in tags
    assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)
    assert "<script>alert" not in page.raw and "\x07" not in page.raw
    assert "alert(1)" in page.text, "it is shown as it is"
    adapter.config.base_model_name_or_path = None


def test_hostile_names_in_a_file(tmp_path):
    """Layer names come from the keys of the weights."""
    model = adapted("bert", share_factors=False)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    old = "encoder.layer.0.attention.self.query"
    state = {key.replace(old, '<i onclick="x">$_{$\n.query'): value for key, value in load_file(path).items()}
    save_file(state, path)
    adapter = read_adapter(tmp_path)
    assert any("<i onclick" in layer.name for layer in adapter.layers)
    page = read(report(Inputs(adapter=adapter, layer=next(n.name for n in adapter.layers if "<i" in n.name))))
    assert not any("onclick" in attrs for _, attrs in page.elements)


def test_figures_keep_their_text_and_get_their_own_ids():
    def svg(prefix):
        figure = Figure()
        ax = figure.subplots()
        ax.plot([0, 1], [0, 1], "o", label='id="p" url(#q)')
        ax.legend()
        return ET.fromstring(markup.inline_svg(figure, prefix))

    one, other = svg("a"), svg("b")
    ids = [{element.get("id") for element in root.iter()} - {None} for root in (one, other)]
    assert ids[0] and not ids[0] & ids[1] and all(each.startswith("a-") for each in ids[0])
    assert 'id="p" url(#q)' in "".join(one.itertext())
    assert not [element for element in one.iter() if element.tag.endswith(("style", "metadata"))]


def test_tables_carry_the_numbers_they_are_sorted_by():
    frame = pd.DataFrame({"layer": ["a.b", "c<"], "value": [0.25, np.nan], "word": ["x", "y"]})
    text = markup.table(frame, "Some numbers", {"value": markup.percent})
    assert '<td class="number" data-value="0.25">25\xa0%</td>' in text
    assert '<td class="number" data-value="">–</td>' in text
    assert '<th scope="row">a.<wbr>b</th>' in text and "c&lt;" in text and "<td>x</td>" in text
    many = pd.DataFrame({"layer": [str(i) for i in range(40)], "value": np.arange(40)})
    assert markup.table(many, "Many").startswith("<details><summary>Many (40 rows)")


@pytest.mark.parametrize(
    "value, shown",
    [(0, "0"), (1234567, "1,234,567"), (-0.5, "−0.500"), (12.345, "12.3"), (3e-7, "3.00e−07"), (np.inf, "–")],
)
def test_numbers_are_short(value, shown):
    assert markup.digits(value) == shown


@pytest.mark.parametrize("value, shown", [(0, "0 %"), (0.5, "50 %"), (0.0123, "1.2 %"), (0.00045, "0.045 %")])
def test_shares_are_percent(value, shown):
    assert markup.percent(value) == shown.replace(" ", "\xa0")


def test_a_report_is_on_an_adapter():
    with pytest.raises(ValueError, match="none was given"):
        report(Inputs())


def test_towers_have_sections_of_their_own(tmp_path):
    model = adapted("clip").eval()
    observed = observe(model, [batch_for("clip", 6)], progress=False)
    names = list(observed.routing)
    log = [{"step": 1, **{f"load/{name}/group_{g}": 1 / 3 for name in names for g in range(3)}}]
    path = write_report(tmp_path / "r.html", Inputs(adapter=observed.adapter, observed=observed, log=log))
    page = read(path.read_text(encoding="utf-8"))
    assert len(names) == 2 and {"routing-0", "routing-1", "load-0", "load-1"} <= set(sections(page))
    assert "2 routers choose a group" in page.sentence("configuration")
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("fields", [dict(k=1), dict(k=1, t=1, p=1), dict(routing="batch")])
def test_few_groups_and_batches(fields):
    model = adapted("bert", **fields).eval()
    batches = batches_for("bert")
    observed = observe(model, batches, labels="labels", progress=False)
    page = read(report(Inputs(adapter=observed.adapter, observed=observed)))
    assert ("routes whole batches" in page.text) == ("routing" in fields)
    assert ("The only group serves all" in page.sentence("routing-0")) == ("k" in fields)


def test_an_adapter_of_the_published_code():
    (directory,) = sorted((Path(__file__).parent / "data").rglob("*bert*official_adapter"))[:1]
    adapter = read_adapter(directory)
    assert isinstance(adapter, Adapter)
    assert "trains" in read(report(Inputs(adapter=adapter))).sentence("parameters")


# --- in a browser --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, that of playwright or of the system."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with api.sync_playwright() as playwright:
        try:
            started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except api.Error as error:
            pytest.skip(f"needs Chromium (playwright install chromium, or apt install chromium): {error}")
        yield started
        started.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_a_browser_shows_the_page(width, scheme, whole, browser, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(whole.raw, encoding="utf-8")
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, said, requests = context.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    assert page.screenshot(full_page=True, path=tmp_path / "page.png")
    assert said == [] and requests == [path.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") == width, "nothing sticks out"
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 200) == (scheme == "dark")
    # 8 px is what a phone shows of the smallest print; text in a figure shrinks with it.
    sizes = page.evaluate(
        "[...document.querySelectorAll('.plot svg')].map(svg => Math.min(...[...svg.querySelectorAll('text')]"
        ".map(text => parseFloat(getComputedStyle(text).fontSize) * svg.getScreenCTM().a)))"
    )
    assert len(sizes) >= 12 and min(sizes) > 7.5
    context.close()


def test_tables_are_sorted_by_mouse_and_keyboard(whole, browser, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(whole.raw, encoding="utf-8")
    page = browser.new_page()
    page.goto(path.as_uri())
    column = "[...document.querySelectorAll('#parameters table:first-of-type')][0]"
    numbers = f"[...{column}.tBodies[0].rows].map(row => Number(row.cells[1].dataset.value))"
    before = page.evaluate(numbers)
    heading = page.locator("#parameters table").first.locator("thead th").nth(1)
    heading.locator("button").click()
    assert page.evaluate(numbers) == sorted(before) and heading.get_attribute("aria-sort") == "ascending"
    heading.locator("button").press("Enter")
    assert page.evaluate(numbers) == sorted(before, reverse=True) != before
    assert heading.get_attribute("aria-sort") == "descending"
    page.close()


def test_without_scripts_the_tables_are_plain(whole, browser, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(whole.raw, encoding="utf-8")
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    assert page.locator("th button").count() == 0
    assert page.locator("#parameters table").first.locator("tbody tr").first.inner_text().startswith("TuckA")
    context.close()
