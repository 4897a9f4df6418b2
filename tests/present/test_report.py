"""The report of a run: what the page holds is what the files hold."""

import json
import re
import shlex
from itertools import pairwise

import pytest
import torch

from moe_precision import Curvature, ExpertStatistics, PlanSettings, PrecisionPlan, RouterNormHistory, allocate
from moe_precision.cli.main import main, parser
from moe_precision.layers.shape import LayerShape
from moe_precision.plans.beside import PlanFiles
from moe_precision.present.report import page as pages
from moe_precision.present.report.charts import bits_heatmaps, kept_steps
from moe_precision.present.report.groups import Widths
from moe_precision.present.report.page import unpacked, write_report
from moe_precision.present.report.run import ReportError, Run, read_run
from moe_precision.present.report.signals import signals_of
from moe_precision.present.report.themes import themes
from moe_precision.present.settling import norm_settings, settling
from moe_precision.present.thinning import evenly_thinned
from tests.support.browser import Browser, chromium

pytest.importorskip("plotly", reason="plotly is not installed: pip install -e .[report]")

SHAPES = {"gate_up_proj": (16, 8), "down_proj": (8, 16)}
NAME = "layers.{}.<b>&mlp"  # a name that is not text in HTML
NORMS = [  # step, two layers of three experts
    (0, [1.0, 1.0, 1.0, 2.0, 2.0, 2.0]),
    (10, [1.5, 1.25, 1.0, 2.5, 2.0, 1.5]),
    (20, [1.125, 1.5, 1.0, 2.5, 2.0, 1.75]),
    (30, [1.125, 1.75, 1.0625, 2.75, 2.0, 1.5]),
]


def shapes(layers=2, experts=3):
    return {NAME.format(at): LayerShape(f"{NAME.format(at)}.gate", experts, SHAPES) for at in range(layers)}


def history_of(layers=None):
    history = RouterNormHistory(layers or shapes(), "a<i>model")
    for step, norms in NORMS:
        history.record(step, torch.tensor(norms))
    history.loads = {"training": {name: torch.tensor([[30.0, 60.0, 90.0]] * 2).double() for name in history.layers}}
    return history


def curvature_of(history):
    rows, columns = (
        {
            name: {p: torch.arange(1.0, 4.0)[:, None].expand(3, s[axis]).contiguous() for p, s in SHAPES.items()}
            for name in history.layers
        }
        for axis in (0, 1)
    )
    return Curvature(history.layers, rows, columns, history.last)


@pytest.fixture
def run(tmp_path):
    """Plan, history and curvature of a run, in a folder with a space in its name."""
    folder = tmp_path / "my run"
    folder.mkdir()
    history = history_of()
    history.save(folder / "precision_plan.history.safetensors")
    curvature_of(history).save(folder / "precision_plan.curvature.safetensors")
    plan = allocate(history=history, method="norm_only", average_bits=2.5, bits=(2, 3), group_size=8)
    plan.with_bits({NAME.format(1): {"down_proj": [4, 2, 2]}}).save(folder / "precision_plan.json")
    return folder


def figures_of(path):
    """What the page's script draws, and the page's text without what is packed."""
    text = path.read_text(encoding="utf-8")
    packed = re.search(r'id="figures">([^<]*)<', text).group(1)
    return json.loads(unpacked(packed)), re.sub(r'(id="(figures|library)">)[^<]*', r"\1", text)


@pytest.mark.slow
def test_the_page_holds_what_the_files_hold(run):
    path = write_report(run)
    assert path == run / "report.html"
    figures, text = figures_of(path)
    first, second = figures["layers"]
    assert first["name"] == NAME.format(0)
    assert [trace["x"] for trace in first["curves"]["data"]] == [[0, 10, 20, 30]] * 3
    assert [trace["y"] for trace in first["curves"]["data"]] == [[n[e] for _, n in NORMS] for e in range(3)]
    assert [trace["y"] for trace in second["curves"]["data"]] == [[n[3 + e] for _, n in NORMS] for e in range(3)]
    # changes of layer 0 are 0.125, 0.75 and 0.0625: 3 bits for the last one alone, as 2.5 bits for three experts allow
    assert [row[1:3] for row in first["rows"]] == [[2, 2], [2, 2], [3, 3]]
    # expert, bits of both matrices, last norm, change, load in even shares, mean squared gradient
    assert second["rows"] == [
        [0, 2, 4, 2.75, 0.75, 0.5, 1.0],
        [1, 2, 2, 2.0, 0.0, 1.0, 2.0],
        [2, 3, 2, 1.5, -0.5, 1.5, 3.0],
    ]
    assert figures["charts"]["bits-0"]["data"][0]["text"] == [[2, 2, 3], [2, 2, 3]]  # gate_up_proj
    assert figures["charts"]["bits-1"]["data"][0]["text"] == [[2, 2, 3], [4, 2, 2]]  # down_proj
    assert figures["charts"]["bits-1"]["data"][0]["z"] == [[0, 0, 1], [2, 0, 0]]
    load, curvature = (second["pairs"][at]["data"] for at in (0, 1))
    points = {(trace["x"][i], trace["y"][i]) for trace in load for i in range(len(trace["x"]))}
    assert points == {(0.75, 0.5), (0.0, 1.0), (-0.5, 1.5)}
    assert sum(len(trace["x"]) for trace in curvature) == 3
    assert "rank correlation -1.00" in second["pairs"][0]["layout"]["title"]["text"]
    assert "no statistics (precision_plan.statistics.safetensors)" in text
    assert not re.search(r"(src|href)=\"(?!#|data:)", text)  # nothing is loaded
    assert path.stat().st_size < 3e6


def test_every_name_is_escaped(run):
    figures, text = figures_of(write_report(run))
    assert "<b>&mlp" not in text
    assert "layers.0.&lt;b&gt;&amp;mlp" in text
    assert "<title>a&lt;i&gt;model: report of a run</title>" in text
    assert "<b>" not in json.dumps([layer["curves"] for layer in figures["layers"]])  # plotly reads it as bold
    assert "'my run" not in text
    assert "my run/precision_plan.json&#39;" in text  # quoted for the shell


def test_commands_are_those_that_the_parser_takes(run):
    _, text = figures_of(write_report(run))
    lines = [line.replace("&#39;", "'") for line in re.findall(r"<code>(moe-precision .*?)</code>", text)]
    assert [line.split()[1] for line in lines] == ["quantize", "compare", "plan"]
    for line in lines:
        words = shlex.split(line)[1:]
        parser([words[0]]).parse_args(words)
    assert f"quantize CHECKPOINT '{run}/precision_plan.json' '{run}/quantized'" in lines[0]


@pytest.mark.slow
def test_every_figure_is_one_that_plotly_takes(run):
    import plotly.graph_objects as graphs

    figures, _ = figures_of(write_report(run))
    template = figures["themes"]["dark"]["template"]
    for figure in [*figures["charts"].values(), *(f for of in figures["layers"] for f in [of["curves"], *of["pairs"]])]:
        graphs.Figure(
            {**figure, "layout": {**figure["layout"], "template": template}}
        )  # raises at a wrong key or value


@pytest.mark.slow
def test_a_large_model_stays_below_five_megabytes(tmp_path):
    layers = shapes(64, 256)
    history = RouterNormHistory(layers, "large")
    norms = torch.rand(64 * 256, generator=torch.Generator().manual_seed(0)) + 0.5
    for step in range(20):
        history.record(step, norms + 0.01 * step * norms.roll(step))
    history.loads = {"training": {name: torch.rand(2, 256, dtype=torch.float64) for name in layers}}
    found = Run(
        PlanFiles(tmp_path / "precision_plan.json"),
        allocate(history=history, method="norm_only", group_size=8),
        history,
    )
    assert kept_steps(found) == evenly_thinned(20, 15)
    text = pages.page(found)
    assert len(text.encode()) < 5e6
    assert "Drawn are 15 of 20 records" in text


def test_empty_damaged_and_foreign_folders_are_errors(run, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main(["report", str(empty)]) == 2
    assert "holds no run: expected a plan (x.json) or a history" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "no such file or folder" in capsys.readouterr().err
    history = run / "precision_plan.history.safetensors"
    whole = history.read_bytes()
    history.write_bytes(whole[:100])
    assert main(["report", str(run)]) == 2
    assert "precision_plan.history.safetensors" in capsys.readouterr().err
    history_of({name.replace("layers", "blocks"): shape for name, shape in shapes().items()}).save(history)
    with pytest.raises(ReportError, match="are of two models"):
        write_report(run)
    history.write_bytes(whole)
    (run / "precision_plan.json").write_text("{")
    assert main(["report", str(run)]) == 2
    assert "precision_plan.json" in capsys.readouterr().err
    assert not (run / "report.html").exists()


def test_of_several_plans_one_is_to_be_named(run):
    plan = PrecisionPlan.load(run / "precision_plan.json")
    plan.save(run / "other.json")
    assert read_run(run).files.plan.name == "precision_plan.json"
    assert read_run(run / "other.json").history is None
    (run / "precision_plan.json").unlink()
    (run / "precision_plan.history.safetensors").rename(run / "third.history.safetensors")
    with pytest.raises(ReportError, match=r"several runs or plans \(other, third\): name one"):
        read_run(run)
    assert read_run(run / "third.history.safetensors").plan is None


def test_a_plan_alone_shows_its_first_and_last_norms(run):
    (run / "precision_plan.history.safetensors").unlink()
    figures, text = figures_of(write_report(run, run / "elsewhere.html"))
    assert figures["layers"][0]["curves"]["data"][1]["y"] == [1.0, 1.75]
    assert "the first and last norms that the plan holds are drawn" in text
    assert "Not recorded: the load." in text


def test_a_history_alone_asks_for_a_plan(run):
    (run / "precision_plan.json").unlink()
    figures, text = figures_of(write_report(run))
    assert "bits-0" not in figures["charts"]
    assert [trace["meta"]["width"] for trace in figures["layers"][0]["curves"]["data"]] == [0, 0, 0]
    assert "moe-precision plan" in text


def test_curvature_of_other_weights_is_left_out(run):
    other = history_of()
    other.record(40, torch.full((6,), 9.0))
    curvature_of(other).save(run / "precision_plan.curvature.safetensors")
    found = read_run(run)
    assert found.curvature is None
    assert [signal.key for signal in signals_of(found)] == ["change", "load"]
    assert any("precision_plan.curvature.safetensors is left out" in line for line in found.absent)


def test_tokens_behind_the_statistics(run):
    history = history_of()
    found = ExpertStatistics(history.layers, router_norms=history.last, text="<two> batches")
    for at, name in enumerate(history.layers):
        moments = {p: torch.eye(inp).repeat(3, 1, 1) for p, (_, inp) in SHAPES.items()}
        found.add(name, moments, torch.tensor([0, 5, 9]) * (at + 1))
    found.save(run / "precision_plan.statistics.safetensors")
    figures, text = figures_of(write_report(run))
    by_name = {trace["name"]: trace["y"] for trace in figures["charts"]["tokens-chart"]["data"]}
    assert by_name == {"least": [0, 0], "median": [5, 10], "most": [9, 18]}
    assert "Taken from &lt;two&gt; batches. 2 experts saw none" in text
    assert [row[-1] for row in figures["layers"][1]["rows"]] == [0, 10, 18]


def test_a_comparison_and_the_demos_results_are_shown(run):
    interval = {"value": 0.25, "low": 0.125, "high": 0.5}
    row = {"method": "curvature", "granularity": "expert", "asked_bits": 2.5, "average_bits": 2.5, "stored_bits": 2.75}
    row |= {"increase": interval, "divergence": {"kl": 0.01, "top1": 0.875}}
    worse = row | {"method": "random", "increase": {"value": 0.75, "low": None, "high": None}}
    found = {"format": "moe-precision-comparison", "loss": {"all": 3.0}, "tokens": 1000, "documents": 4, "text": "<x>"}
    (run / "c.json").write_text(json.dumps(found | {"rows": [worse, row], "verdict": ["use <curvature>"]}))
    demo = {"model": "plan", "nominal_bits": 2.5, "stored_bits": 2.75, "file_mb": 1.5, "divergence": None}
    (run / "results.json").write_text(json.dumps([demo | {"evaluation": {"loss": 3.5, "rare_loss": 6, "tokens": 9}}]))
    (run / "broken.json").write_text("{")
    (run / "old.json").write_text(json.dumps(found | {"rows": [{"method": "curvature"}]}))
    figures, text = figures_of(write_report(run))
    (trace,) = figures["charts"]["comparison-0"]["data"]
    assert trace["y"] == ["curvature", "random"]
    assert trace["error_x"]["array"] == [0.25, 0.0]
    assert trace["error_x"]["arrayminus"] == [0.125, 0.0]
    assert trace["marker"]["symbol"] == ["circle", "circle-open"]
    assert "<td>0.12500 to 0.50000</td>" in text
    assert "use &lt;curvature&gt;" in text
    assert "<td>3.5000</td>" in text
    assert "and left out: broken.json, old.json" in text


def test_norms_that_are_not_finite_are_gaps(run):
    history = history_of()
    history.record(40, torch.tensor([1.0, float("nan"), 1.0, 2.0, 2.0, float("inf")]))
    history.save(run / "precision_plan.history.safetensors")
    (run / "precision_plan.json").unlink()
    figures, text = figures_of(write_report(run))
    assert figures["layers"][0]["curves"]["data"][1]["y"][-2:] == [1.75, None]
    assert "settling-chart" not in figures["charts"]
    assert "At least three records of finite norms are needed" in text


def test_without_plotly_the_message_says_what_to_install(run, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "plotly", None)
    assert main(["report", str(run)]) == 2
    assert "pip install 'moe-precision[report]'" in capsys.readouterr().err


def test_when_a_plan_settled():
    """Changes of layer 0: (0.5, 0.25, 0) at step 10, (0.125, 0.5, 0) at 20, in that order to the end; layer 1 stays."""
    found = settling(history_of(), PlanSettings(method="router_norm", average_bits=2.7, bits=(2, 3)))  # 2 of 3 experts
    assert found.steps == [10, 20, 30]
    assert found.to_last == pytest.approx([1 / 3, 0, 0])  # experts 0 and 1 of layer 0, of six
    assert found.to_previous == [None, pytest.approx(1 / 3), 0]
    assert found.settled_at == 20
    history = RouterNormHistory(shapes(), "two")
    for step, norms in NORMS[:2]:
        history.record(step, torch.tensor(norms))
    assert settling(history, PlanSettings(method="router_norm")) is None


@pytest.mark.parametrize(
    ("average", "levels", "expected"),
    [
        (2.5, (1, 2, 3, 4), (2, 3)),
        (2.0, (1, 2, 3, 4), (1, 2, 3)),
        (1.5, (1, 2, 4), (1, 2)),
        (2.0, (1, 2, 4), (2, 3)),  # not equally spaced: the default
    ],
)
def test_settings_for_the_papers_rule_at_a_plans_budget(average, levels, expected):
    widths = {2.5: [2, 3], 2.0: [2, 2], 1.5: [1, 2]}[average]
    history = RouterNormHistory(shapes(1, 2), "x")
    history.record(0, torch.ones(2))
    history.record(1, torch.ones(2))
    plan = allocate(history=history, method="uniform", average_bits=2, group_size=8).with_bits({NAME.format(0): widths})
    plan = PrecisionPlan.from_dict(
        plan.to_dict() | {"method": "curvature", "settings": {"bits": list(levels), "granularity": "expert"}}
    )
    assert tuple(norm_settings(plan).levels) == expected


def test_many_different_means_are_grouped_by_whole_bits(run):
    plan = read_run(run).plan
    assert Widths(plan).groups == [2, 2.5, 3]  # both matrices are as large: (2 + 4) / 2, (3 + 2) / 2
    assert Widths(None).groups == [None]
    assert [name for name, _ in bits_heatmaps(plan)] == ["gate_up_proj", "down_proj"]


def luminance(color):
    """Relative luminance, as in WCAG 2."""
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(("theme", "ground"), [("light", "#ffffff"), ("dark", "#0d1117")])
def test_widths_differ_in_lightness_and_stand_out(theme, ground):
    colors = themes(4, 4)[theme]["widths"]
    values = [luminance(color) for color in colors]
    assert values == sorted(values, reverse=theme == "light")
    ratios = [(max(a, b) + 0.05) / (min(a, b) + 0.05) for a, b in pairwise(values)]
    assert min(ratios) > 1.3
    on_ground = [(max(v, luminance(ground)) + 0.05) / (min(v, luminance(ground)) + 0.05) for v in values]
    assert min(on_ground) > 2.9
    assert on_ground == sorted(on_ground)  # more bits, more contrast


@pytest.mark.slow
@pytest.mark.skipif(chromium() is None, reason="no Chromium on this machine: apt-get install chromium")
def test_a_browser_draws_the_page_and_it_works_by_mouse_and_keyboard(run):
    path = write_report(run)
    with Browser() as browser:
        browser.screen(1200, 900)
        browser.open(path)
        of_charts = "[...document.querySelectorAll('.chart')].map((c) => c.querySelectorAll('svg.main-svg').length)"
        drawn = browser.value(of_charts)
        assert len(drawn) == 1 + 3 + 2 + 1  # curves, pairs, heatmaps, settling
        assert all(drawn)
        assert browser.value("document.querySelectorAll('#curves .scatterlayer .trace').length") == 3
        assert browser.value("document.querySelectorAll('.bits .heatmaplayer image').length") == 2
        assert browser.value("performance.getEntriesByType('resource').length") == 0  # no network

        shown = "document.querySelector('.layer-name').textContent"
        browser.value("document.getElementById('layer').focus()")
        browser.press("ArrowDown", 40)
        assert browser.wait(f"{shown} === {json.dumps(NAME.format(1))}")
        browser.press("Tab", 9)
        assert browser.value("document.activeElement.id") == "before"
        browser.press("Enter", 13)
        assert browser.wait(f"{shown} === {json.dumps(NAME.format(0))}")

        left, top, width, height = browser.box("#bits-1 .nsewdrag")
        browser.click(left + width / 2, top + height * 3 / 4)  # expert 1 of layer 1
        assert browser.wait("document.getElementById('expert').value === '1'")
        assert browser.value(shown) == NAME.format(1)
        left, top, width, height = browser.box("#bits-1 .nsewdrag")
        browser.move(left + width / 6, top + height * 3 / 4)
        assert browser.wait("document.querySelector('#bits-1 .hovertext')?.textContent === 'layer 1, expert 0: 4 bits'")

        browser.value("document.getElementById('theme').focus()")
        browser.press("Enter", 13)
        assert browser.wait("document.documentElement.dataset.theme === 'dark'")
        browser.screen(360, 740, phone=True, dark=True)
        browser.open(path)
        assert browser.value("document.documentElement.dataset.theme") == "dark"
        assert browser.value("document.documentElement.scrollWidth") <= 360  # the page does not scroll sideways
