"""The report holds everything, loads nothing, and is the same bytes each time."""

import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from stillroom.evaluation.attribution import attribute_loss, judge
from stillroom.evaluation.estimates import Estimate
from stillroom.evaluation.gates import GateBounds, check_gates
from stillroom.evaluation.report import (
    Curve,
    LayerError,
    LineageEntry,
    ModelRow,
    ReportData,
    render_markdown,
    render_report,
    render_table,
)
from stillroom.evaluation.tables import format_count, format_estimate
from tests.stillroom.evaluation.test_gates import COST, GOOD, measured

EVIL = "<script>alert('$x_1$')</script> & | https://example.org/x.js"


@pytest.fixture(scope="module")
def data() -> ReportData:
    teacher, student = measured(3.0), measured(3.2, seed=1)
    quantized, adapter = measured(3.25, seed=2), measured(3.0, seed=3)
    steps = attribute_loss([("teacher", teacher), ("student", student), ("quantized", quantized)])
    (gain,) = attribute_loss([("quantized", quantized), ("adapter", adapter)])
    small = replace(COST, size_on_disk_bytes=1_500_000)
    blocks = [(b, name) for b in range(3) for name in ("self_attn.q_proj", "mlp.up_proj")]
    return ReportData(
        title=f"tiny {EVIL}",
        created="2026-01-02 03:04 UTC",
        summary="Registered as tiny, version 1.",
        rows=(
            ModelRow("teacher", "docs", teacher, COST),
            ModelRow(f"student {EVIL}", "docs", student, COST, steps[0]),
            ModelRow("quantized student", "docs", quantized, small, steps[1]),
            ModelRow("quantized student + lora", f"code {EVIL}", adapter, small, gain, "adapter"),
            ModelRow("cross-entropy only", "docs", measured(3.4, seed=4), COST, None, "control"),
        ),
        curves=(
            Curve("distillation", f"loss {EVIL}", "nats", tuple(range(900)), (2.0, 1.0, 1.5) * 300),
            Curve("distillation", "held-out loss", "nats", (10, 20), (2.0, 1.5)),
            Curve("adapter", "loss", "nats", (1, 2, 3), (2.0, 1.5, 1.2)),
        ),
        layer_errors=(
            *(LayerError(f"layers.{b}.{n}", 0.01 * (b + 1), b, 4, b == 2) for b, n in blocks),
            LayerError(f"lm_head {EVIL}", 0.02),
        ),
        verdicts=(
            judge("student beats control", student, measured(3.4, seed=4)),
            judge(f"nothing beats itself {EVIL}", teacher, teacher),
        ),
        gates=tuple(check_gates(GOOD, GateBounds(max_size_bytes=1, max_kl_nats=0.9))),
        lineage=(LineageEntry("data", "ab" * 32, None, True), LineageEntry("student", "cd" * 32)),
        recipe_text=f"name: tiny # {EVIL}\n",
        hardware={"cpu": f"cpu {EVIL}"},
        versions={"torch": "2.13.0"},
    )


@pytest.fixture(scope="module")
def page(data, tmp_path_factory) -> str:
    target = tmp_path_factory.mktemp("report") / "report.html"
    render_report(data, target)
    return target.read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Collect tags, attributes and text as a browser would see them."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.words, self.open = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def elements(page) -> Elements:
    parser = Elements()
    parser.feed(page)
    assert parser.open == []
    return parser


def test_nothing_is_loaded_from_outside(page, elements):
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(elements.tags)
    for _, name, value in elements.attributes:
        assert name not in ("src", "srcset", "action")
        if name in ("href", "xlink:href"):
            assert value.startswith("#")
        assert not re.search(r"url\((?!#)", value)
    assert "@import" not in page
    assert not re.search(r"https?://(?!example\.org)", page)


def test_names_are_escaped_everywhere(page, elements):
    assert "<script" not in page
    text = "".join(elements.words)
    assert text.count("<script>alert('$x_1$')</script>") >= 10


def test_every_row_gate_verdict_and_key_is_there(data, elements):
    text = " ".join("".join(elements.words).split())
    shown = [row.name for row in data.rows] + [gate.sentence for gate in data.gates]
    shown += [verdict.sentence for verdict in data.verdicts]
    shown += [entry.key for entry in data.lineage] + [error.module for error in data.layer_errors]
    shown += [data.title, data.summary, data.recipe_text.strip(), "2.13.0"]
    for words in shown:
        assert " ".join(words.split()) in text


def test_four_plots_with_their_descriptions(elements):
    assert elements.tags.count("svg") == 4
    labels = [value for tag, name, value in elements.attributes if name == "aria-label"]
    assert len(labels) == 4
    assert all(label.endswith(".") for label in labels)


def test_tables_have_headers(elements):
    scopes = [value for tag, name, value in elements.attributes if (tag, name) == ("th", "scope")]
    assert scopes.count("row") >= 5
    assert len(scopes) == elements.tags.count("th")


def test_ids_are_unique_and_found(elements):
    ids = [value for _, name, value in elements.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for _, name, value in elements.attributes:
        if name in ("href", "xlink:href"):
            assert value[1:] in ids


def test_plots_take_their_colours_from_the_page(page):
    assert "var(--series-1)" in page
    assert "#0101" not in page


def test_the_same_data_gives_the_same_bytes(data, page, tmp_path):
    render_report(ReportData.from_json(data.to_json()), tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == page


def test_the_data_lie_beside_the_page(data, tmp_path):
    render_report(data, tmp_path / "new" / "report.html")
    text = (tmp_path / "new" / "report.json").read_text(encoding="utf-8")
    assert ReportData.from_json(text) == data


def test_a_report_of_one_row_without_costs_renders(data, tmp_path):
    bare = ReportData("bare", "today", (ModelRow("teacher", "docs", measured()),))
    render_report(bare, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "teacher" in page
    assert "<svg" not in page
    assert "Decode" not in render_table(bare)


def test_an_encoder_shows_accuracy(data, tmp_path):
    quality = replace(measured(), task="sequence_classification")
    cost = replace(COST, decode_tokens_per_second=None, prefill_unit="sequences/s")
    rows = tuple(ModelRow(name, "docs", quality, cost) for name in ("teacher", "student"))
    encoder = ReportData("encoder", "today", rows)
    table = render_table(encoder)
    assert "Accuracy" in table
    assert "sequences/s" in table
    assert "Perplexity" not in table
    render_report(encoder, tmp_path / "report.html")


def test_a_masked_model_shows_pseudo_perplexity_and_accuracy(tmp_path):
    quality = replace(measured(), task="masked_lm")
    cost = replace(COST, decode_tokens_per_second=None, prefill_unit="sequences/s")
    rows = tuple(ModelRow(name, "docs", quality, cost) for name in ("teacher", "student"))
    masked = ReportData("masked", "today", rows)
    header = render_table(masked).splitlines()[0]
    assert "Pseudo-perplexity" in header
    assert "Accuracy" in header
    assert "Decode" not in header
    assert "sequences/s" in render_table(masked)
    render_report(masked, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "pseudo-perplexity (lower is better)" in page
    assert '<span class="label">Pseudo-perplexity</span>' in page


def test_names_in_any_script_render(tmp_path):
    rows = (ModelRow("蒸留モデル", "文書", measured(), COST),)
    render_report(ReportData("題", "today", rows), tmp_path / "report.html")
    assert "蒸留モデル" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_table_is_aligned(data):
    lines = render_table(data).splitlines()
    first, rule = lines[0], lines[2]
    assert set(rule) == {"─"}
    assert len(first) == len(rule)
    end = first.index("Perplexity") + len("Perplexity")
    for line, row in zip(lines[3:8], data.rows, strict=True):
        assert line.startswith(row.name)
        assert line[:end].endswith(format_estimate(row.quality.estimate("perplexity")).text())


def test_the_table_says_what_failed(data):
    table = render_table(data)
    assert "gate size fails" in table
    assert "gate kl" not in table
    assert "student beats control: yes" in table


def test_markdown_has_every_row_and_no_markup_from_names(data):
    text = render_markdown(data)
    assert "<script" not in text
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + len(data.rows)
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(12.3456, 0.0421, 9), "12.346 ± 0.042"),
        (Estimate(1234.5, 15.2, 9), "1,234 ± 15"),
        (Estimate(130000.0, 3200.0, 9), "130,000 ± 3,200"),
        (Estimate(0.5, 1e-9, 9), "0.5000 ± 0.0000"),
        (Estimate(2.0, None), "2"),
        (Estimate(27.654321, 0.0), "27.65"),
        (Estimate(float("inf"), None), "∞"),
        (Estimate(float("nan"), None), "NaN"),
    ],
)
def test_numbers_are_shown_to_the_second_digit_of_their_error(estimate, text):
    assert format_estimate(estimate).text() == text


def test_counts_are_short():
    assert [format_count(n) for n in (999, 1500, 134_515_008, 7_000_000_000)] == [
        "999",
        "1.5k",
        "134.5M",
        "7B",
    ]


def test_data_that_is_no_number_is_read_back(data):
    nan, infinite = float("nan"), float("inf")
    broken = replace(
        data,
        layer_errors=(LayerError("lm_head", nan),),
        curves=(Curve("distillation", "loss", "nats", (1, 2), (infinite, -infinite)),),
    )
    read = ReportData.from_json(broken.to_json())
    assert math.isnan(read.layer_errors[0].relative_error)
    assert replace(read, layer_errors=()) == replace(broken, layer_errors=())
