"""The paper's tables, counted: within its figures, or with a reason; and their forms on paper and as pictures."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from effkernels.models import EfficientNet, create_model
from effkernels.models.compound import EFFICIENTNET, PUBLISHED, CompoundScaling
from effkernels.scaling import paper, tables
from effkernels.scaling.accuracies import read_accuracies
from effkernels.scaling.families import EFFICIENTNET_B0, build_sequential
from effkernels.scaling.figures import save_figure
from effkernels.scaling.network import Rounding, Stage, StagedNetwork, scale
from effkernels.scaling.table import Column, Table

# One worker has the tables of the fixtures: each table counts dozens of networks.
pytestmark = pytest.mark.xdist_group("scaling-tables")

SMALL = StagedNetwork(
    "small",
    16,
    (
        Stage("conv", 1, 8, 2, options={"activation": "relu"}, deepens=False),
        Stage("inverted_residual", 2, 16, 2, 5, {"expansion": 6, "activation": "silu", "se_ratio": 0.25}),
    ),
    build_sequential,
)


@pytest.fixture(scope="module")
def variants() -> Table:
    return tables.variants()


@pytest.fixture(scope="module")
def families() -> Table:
    return tables.families()


@pytest.fixture(scope="module")
def growth() -> Table:
    return tables.growth(SMALL, phis=(1, 2))


def test_table_1() -> None:
    """As the paper prints it: operator, size, channels, layers."""
    shown = [row[1:3] + row[4:] for row in tables.stages(EFFICIENTNET_B0).shown()]
    assert shown == [
        ["conv, k3x3", "224", "32", "1"],
        ["MBConv1, k3x3", "112", "16", "1"],
        ["MBConv6, k3x3", "112", "24", "2"],
        ["MBConv6, k5x5", "56", "40", "2"],
        ["MBConv6, k3x3", "28", "80", "3"],
        ["MBConv6, k5x5", "14", "112", "3"],
        ["MBConv6, k5x5", "14", "192", "4"],
        ["MBConv6, k3x3", "7", "320", "1"],
        ["conv, k1x1", "7", "1280", "1"],
    ]


class TestStep2:
    @pytest.mark.parametrize("name", sorted(PUBLISHED))
    def test_published_coefficients_make_the_registrys_networks(self, name: str) -> None:
        built = tables.variant(name).build(device="meta")
        registered = create_model(f"efficientnet_{name}", device="meta")
        assert isinstance(built, EfficientNet)
        assert isinstance(registered, EfficientNet)
        assert built.architecture == registered.architecture
        assert tables.variant(name).resolution == PUBLISHED[name].resolution
        shapes = [{key: t.shape for key, t in model.state_dict().items()} for model in (built, registered)]
        assert shapes[0] == shapes[1]

    def test_table_2_is_within_5_percent_of_flops_and_2_percent_of_parameters(self, variants: Table) -> None:
        assert [row["variant"] for row in variants.rows] == ["B0", "B1", "B2", "B3", "B4", "B5", "B6", "B7"]
        for row, (parameters, gflops) in zip(variants.rows, paper.VARIANTS.values(), strict=True):
            assert row["gflops"] == pytest.approx(float(gflops), rel=0.05)
            assert row["parameters_m"] == pytest.approx(float(parameters), rel=0.02)

    def test_equation_3_beside_the_published(self) -> None:
        rows = tables.equation_3().rows
        for phi, (row, own) in enumerate(zip(rows, PUBLISHED.values(), strict=True)):
            assert row["phi"] == phi
            assert row["resolution"] == scale(EFFICIENTNET_B0, phi).resolution
            assert (row["published_depth"], row["published_width"]) == (own.depth, own.width)
            assert EFFICIENTNET.depth(float(row["phi_of_depth"] or 0)) == pytest.approx(own.depth)
        assert tables.equation_3(CompoundScaling(1.2, 1.0, 1.3)).rows[1]["phi_of_width"] is None


class TestFamilies:
    def test_every_difference_over_5_percent_is_explained(self, families: Table) -> None:
        for row in families.rows:
            explained = row["note"] not in ("", "not explained")
            assert explained == (abs(float(row["difference"] or 0)) > 0.05), row

    def test_every_line_of_the_paper_is_there(self, families: Table) -> None:
        lines = [(row["network"], row["paper_gflops"]) for row in families.rows if row["table"] == "3"]
        assert lines == [
            *[("MobileNetV1", gflops) for gflops in ("0.6", "2.2", "2.2", "2.3")],
            *[("MobileNetV2", gflops) for gflops in ("0.3", "1.2", "1.1", "1.2", "1.3")],
            *[("ResNet-50", gflops) for gflops in ("4.1", "16.2", "14.7", "16.4", "16.7")],
        ]

    def test_coefficients_that_the_paper_does_not_print_are_called_ours(self, families: Table) -> None:
        ours = [(row["network"], row["way"]) for row in families.rows if row["coefficients"] == "ours"]
        assert ours == [("MobileNetV2", "compound"), ("ResNet-50", "compound")]
        assert any("`ours`" in note for note in families.notes)

    def test_resnets_two_lines_fit_each_others_number(self, families: Table) -> None:
        """The note says of them: as counted, d=4 is the paper's w=2, and vice versa."""
        counted = {row["way"]: float(row["gflops"] or 0) for row in families.rows if row["network"] == "ResNet-50"}
        assert counted["depth"] == pytest.approx(14.7, rel=0.01)
        assert counted["width"] == pytest.approx(16.2, rel=0.01)


class TestGrowth:
    def test_predicted_is_equation_3_and_the_same_in_every_way(self, growth: Table) -> None:
        for row in growth.rows[1:]:
            assert row["predicted_growth"] == pytest.approx(EFFICIENTNET.flops(float(row["phi"] or 0)))
            d, w, r = (float(row[key] or 0) for key in ("depth", "width", "resolution"))
            assert d * w**2 * r**2 == pytest.approx(row["predicted_growth"])

    def test_counted_is_of_the_scaled_network(self, growth: Table) -> None:
        base = SMALL.cost().multiply_adds
        for row in growth.rows:
            d, w, r = (float(row[key] or 0) for key in ("depth", "width", "resolution"))
            counted = scale(SMALL, depth=d, width=w, resolution=r).cost()
            assert row["counted_growth"] == counted.multiply_adds / base
            assert row["activation_mb"] == counted.activation_bytes / 1e6

    def test_regular_convolutions_grow_as_predicted(self) -> None:
        """If channels and pixels need no rounding, width and resolution differ from it only by stem and classifier."""
        plain = StagedNetwork(
            "plain", 64, (Stage("conv", 4, 64, options={"activation": "relu"}),), build_sequential
        )  # fmt: skip
        for factors in ({"width": 2.0}, {"resolution": 2.0}, {"depth": 4.0}):
            counted = scale(plain, **factors).cost().multiply_adds / plain.cost().multiply_adds
            assert counted == pytest.approx(4, rel=0.25 if "depth" in factors else 0.02)


class TestForms:
    TABLE = Table(
        "one",
        "A | title",
        (Column("name", "name"), Column("gflops", "GFLOPs", "#.3g"), Column("off", "off", "+.1%")),
        ({"name": "a|b", "gflops": 1.23456, "off": -0.05}, {"name": "c", "gflops": 20, "off": None}),
        ("A note.",),
    )

    def test_markdown(self) -> None:
        assert self.TABLE.markdown() == (
            "**A | title**\n\n| name | GFLOPs | off |\n| --- | --: | --: |\n| a\\|b | 1.23 | -5.0% |\n| c | 20.0 |  |\n"
            "\nA note.\n"
        )

    def test_csv_and_json_hold_the_unrounded_numbers(self) -> None:
        read = list(csv.DictReader(io.StringIO(self.TABLE.csv())))
        assert read == [{"name": "a|b", "gflops": "1.23456", "off": "-0.05"}, {"name": "c", "gflops": "20", "off": ""}]
        assert json.loads(self.TABLE.json())["rows"][0] == {"name": "a|b", "gflops": 1.23456, "off": -0.05}

    def test_an_unknown_form_is_refused(self) -> None:
        with pytest.raises(ValueError, match="format='html'; allowed: text, markdown, csv, json"):
            self.TABLE.show("html")


def drawn(file: Path) -> float:
    """Share of the pixels that are not white."""
    return float((matplotlib.image.imread(file)[..., :3].min(axis=2) < 0.99).mean())


class TestFigures:
    def test_every_table_has_one(self, variants: Table, families: Table, growth: Table, tmp_path: Path) -> None:
        beside = tables.scaled(SMALL, scale(SMALL, 2))
        assert beside is not None
        for table in (tables.stages(SMALL), beside, variants, families, tables.equation_3(), growth):
            file = tmp_path / f"{table.name}.png"
            save_figure(table, file)
            height, width = matplotlib.image.imread(file).shape[:2]
            assert min(height, width) >= 500
            assert drawn(file) > 0.01

    def test_what_has_none_is_refused(self) -> None:
        with pytest.raises(ValueError, match="the table 'one' has no figure; allowed: stages"):
            save_figure(TestForms.TABLE, "nowhere.png")

    def test_runs_are_laid_over(self, growth: Table, tmp_path: Path) -> None:
        file = tmp_path / "runs.csv"
        file.write_text("name,accuracy,gflops,way\nsmall,0.9,,\ncompound phi=2,0.95,,\nmine,0.8,0.001,mine\n")
        runs = read_accuracies(file, growth)
        by_name: Mapping[Any, Any] = {row["name"]: row for row in growth.rows}
        assert [(run.way, run.gflops) for run in runs] == [
            ("baseline", by_name["small"]["gflops"]),
            ("compound", by_name["compound phi=2"]["gflops"]),
            ("mine", 0.001),
        ]
        save_figure(growth, tmp_path / "without.png")
        save_figure(growth, tmp_path / "with.png", runs)
        widths = [matplotlib.image.imread(tmp_path / f"{name}.png").shape[1] for name in ("without", "with")]
        assert widths[1] > widths[0]  # a panel more

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            (
                "runs.csv",
                "name,accuracy\nother,1\n",
                "run 1: 'other' is no line of the growth table, so it needs gflops",
            ),
            ("runs.csv", "name,accuracy\nsmall,high\n", "run 1: accuracy='high'"),
            ("runs.csv", "name,accuracy\n", "no runs"),
            ("runs.jsonl", '{"accuracy": 1}\n', "run 1: no name"),
            ("runs.jsonl", "[1]\n", "a line is not a JSON object"),
            ("runs.jsonl", "{", "one JSON object a line"),
        ],
    )
    def test_runs_that_cannot_be_read_are_named(
        self, growth: Table, tmp_path: Path, name: str, text: str, message: str
    ) -> None:
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            read_accuracies(tmp_path / name, growth)


def test_scaled_stages_are_beside_the_baselines() -> None:
    table = tables.scaled(SMALL, scale(SMALL, depth=2, width=2, rounding=Rounding(divisor=1)))
    assert table is not None
    assert table.shown() == [
        ["1", "conv, k3x3", "16", "16", "8", "16", "1", "1"],
        ["2", "MBConv6, k5x5", "8", "8", "16", "32", "2", "4"],
    ]
