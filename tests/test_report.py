"""Pictures and pages: what is drawn is what was measured or planned, and never both at once."""

from __future__ import annotations

import dataclasses
import itertools
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from test_benchmark import make_row
from test_cli import run
from test_documentation import PAGES

from effkernels import _library
from effkernels.bench import timing
from effkernels.bench.timing import Row
from effkernels.plan import gpus
from effkernels.plan.launches import plan_model
from effkernels.report import charts, measured, planned, svg
from effkernels.report.page import Page
from effkernels.report.parts import Origin, Picture, Table

SVG = "{http://www.w3.org/2000/svg}"
CALIBRATION = {"product_gflops": [90.0, 100.0], "copy_gb_s": [20.0, 18.0]}


def texts(image: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(image).iter(f"{SVG}text")]


def tips(image: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(image).iter(f"{SVG}title")]


def rows() -> list[Row]:
    """A row or two of every suite."""
    found = [
        make_row(batch=batch, contender=name, median_us=us * batch, images_per_s=1e6 / us)
        for batch in (1, 4, 16)
        for name, us in (("effkernels-cpu", 1000.0), ("eager (timm)", 2500.0))
    ]
    for name, us in (("effkernels-cpu", 100.0), ("eager (timm)", 300.0)):
        found.append(make_row(suite="layer", contender=name, median_us=4 * us))
        for part in ("before the blocks", "blocks.0.0", "blocks.1.0", "blocks.1.1"):
            found.append(make_row(suite="layer", contender=name, part=part, median_us=us))
    block = "efficientnet_b0 blocks.1.0 4x16x112x112 to 24x56x56"
    found.append(make_row(suite="block", case=block, median_us=400.0, floor_us=100.0, flops=10, bytes=10))
    op = make_row(suite="op", case="pointwise_bn_act 4x96x14x14 to 24", median_us=100.0, calibration=CALIBRATION)
    found.append(dataclasses.replace(op, flops=4_000_000, bytes=1_000_000))
    found.append(make_row(suite="train", contender="effkernels", peak_bytes=31_600_000))
    found.append(make_row(suite="train", contender="eager", peak_bytes=88_300_000))
    return found


class TestCharts:
    def test_are_well_formed_and_name_their_series(self) -> None:
        image = charts.lines("Title", "a < b & c", "x", "ms", {"one": [(1, 2.0), (4, 8.0)], "two": [(1, 3.0)]})
        assert {"Title", "a < b & c", "one", "two"} <= set(texts(image))

    def test_a_line_has_a_marker_for_each_value(self) -> None:
        image = charts.lines("Title", "", "images", "ms", {"one": [(1, 2.0), (4, 8.0)]}, log=True)
        assert [tip for tip in tips(image) if tip.startswith("one")] == [
            "one, images 1: 2.00 ms", "one, images 4: 8.00 ms",
        ]  # fmt: skip

    def test_names_at_the_ends_of_close_lines_do_not_overlap(self) -> None:
        series = {f"contender {number}": [(1, 1.0), (16, 100 + number / 100)] for number in range(8)}
        image = ElementTree.fromstring(charts.lines("Title", "", "x", "ms", series))
        places = sorted(
            float(element.get("y", "0")) for element in image.iter(f"{SVG}text") if element.text in series
        )  # fmt: skip
        assert len(places) == 8
        assert all(after - before > 14 for before, after in itertools.pairwise(places))

    def test_bars_are_as_long_as_their_values(self) -> None:
        image = ElementTree.fromstring(charts.bars("Title", "", [("case", {"a": 2.0, "b": 6.0})], "ms"))
        wide = [float(bar.get("width", "0")) for bar in image.iter(f"{SVG}rect") if bar.find(f"{SVG}title") is not None]
        assert wide[1] == pytest.approx(3 * wide[0], abs=0.2)

    def test_parts_of_a_stack_add_up_and_are_beside_each_other(self) -> None:
        image = ElementTree.fromstring(charts.stacked("Title", "", {"one": {"a": 1.0, "b": 2.0}}, "ms"))
        first, second = (bar for bar in image.iter(f"{SVG}rect") if bar.find(f"{SVG}title") is not None)
        assert float(second.get("x", "0")) == pytest.approx(
            float(first.get("x", "0")) + float(first.get("width", "0")), abs=0.2
        )
        assert "3.00 ms" in [element.text for element in image.iter(f"{SVG}text")]

    def test_a_kernel_at_the_roof_is_drawn_on_it(self) -> None:
        ceiling = charts.Ceiling(100.0, 10.0, "product", "copy")
        points = [charts.Point("a", "k", 5.0, 50.0, "under memory"), charts.Point("a", "k", 40.0, 50.0, "half")]
        shares = [tip.rpartition(", ")[2] for tip in tips(charts.roofline("Title", "", points, ceiling))]
        assert shares == ["100% of the roof", "50% of the roof"]

    def test_a_contender_has_the_same_colour_in_every_chart(self) -> None:
        one = charts.colours(["effkernels-cpu", "eager (timm)", "something else"])
        other = charts.colours(["eager (torchvision)", "effkernels-cuda"])
        assert one["effkernels-cpu"] == other["effkernels-cuda"]
        assert one["eager (timm)"] == other["eager (torchvision)"]
        assert len(set(one.values())) == 3

    def test_every_class_of_an_image_has_a_colour_in_both_schemes(self) -> None:
        image = charts.stacked("Title", "", {"one": {str(number): 1.0 for number in range(12)}}, "ms")
        alone = svg.standalone(image)
        ElementTree.fromstring(alone)
        assert "prefers-color-scheme:dark" in alone
        assert set(re.findall(r"--\w+", svg.LIGHT)) == set(re.findall(r"--\w+", svg.DARK))
        for name in {name for classes in re.findall(r'class="([^"]+)"', image) for name in classes.split()}:
            assert f".{name}" in svg.style(".chart")

    @pytest.mark.parametrize(("top", "last"), [(1.0, 1.0), (0.93, 1.0), (37.0, 40.0), (100.0, 100.0), (0.004, 0.004)])
    def test_ticks_reach_the_top(self, top: float, last: float) -> None:
        ticks = svg.linear_ticks(top)
        assert ticks[0] == 0
        assert ticks[-1] == pytest.approx(last)
        assert 3 <= len(ticks) <= 7


class TestMeasured:
    def test_every_suite_has_its_pictures(self) -> None:
        names = [picture.title for picture in measured.all_pictures(rows())]
        assert names == [
            "Throughput by batch", "Time of a call by batch", "Time by stage of the network", "Time by block",
            "Share of the floor by block", "Operators below the roof of this machine", "Time of a call, batch 4",
            "Peak memory of a training step",
        ]  # fmt: skip

    def test_stages_are_sums_of_blocks(self) -> None:
        (picture, _) = measured.by_layer(measured.newest_groups([row for row in rows() if row.suite == "layer"]))
        assert "effkernels-cpu: blocks.1: 0.200 ms, 50%" in tips(picture.svg)
        assert "eager (timm): before the blocks: 0.300 ms, 25%" in tips(picture.svg)

    def test_the_roof_is_the_best_of_the_run(self) -> None:
        (picture,) = measured.rooflines(measured.newest_groups([row for row in rows() if row.suite == "op"]))
        assert "matrix product, measured: 100 GFLOP/s" in texts(picture.svg)
        assert "copy, measured: 20.0 GB/s" in texts(picture.svg)
        # 4 FLOPs a byte at 20 GB/s are 80 GFLOP/s, and 4 MFLOP in 100 us are 40.
        assert any("40.0 GFLOP/s, 50% of the roof" in tip for tip in tips(picture.svg))

    def test_without_a_calibration_there_is_no_roof(self) -> None:
        bare = [dataclasses.replace(row, calibration=None) for row in rows() if row.suite == "op"]
        assert list(measured.rooflines(measured.newest_groups(bare))) == []

    def test_share_of_the_floor(self) -> None:
        (picture,) = measured.shares_of_floor(measured.newest_groups([row for row in rows() if row.suite == "block"]))
        assert "25.0 %" in texts(picture.svg)

    def test_names_of_pictures_differ(self) -> None:
        names = [picture.name for picture in measured.all_pictures([*rows(), make_row(dtype="bfloat16")])]
        assert len(set(names)) == len(names)

    def test_the_page_is_one_file_that_loads_nothing(self) -> None:
        html = measured.page(rows()).html()
        assert "<script" not in html
        assert not re.search(r"(?:src|href)=\"(?!#)", html)
        assert "http" not in html.replace("http://www.w3.org/2000/svg", "")
        assert html.count("<svg ") == len(measured.all_pictures(rows()))
        assert "prefers-color-scheme:dark" in html

    def test_names_in_rows_cannot_break_the_page(self) -> None:
        html = measured.page([make_row(contender="<script>x</script>", case="a & b@1")]).html()
        assert "<script>" not in html

    def test_times_that_cannot_be_believed_are_marked(self) -> None:
        assert "believe its ratios more" in measured.page([make_row(steady=False)]).html()


@pytest.mark.skipif(not _library.is_loaded(), reason=f"no plan without the library: {_library.load_error()}")
class TestPlanned:
    def test_everything_says_that_it_is_an_estimate(self) -> None:
        gpu = gpus.find("h200")
        plan = plan_model("efficientnet_b0", gpu=gpu, batch_size=2, img_size=64)
        html = planned.page(plan, gpu).html()
        assert "Nothing on this page was measured" in html
        for picture in (planned.roofline(plan, gpu), planned.by_part(plan, gpu), planned.by_term(plan, gpu)):
            assert picture.origin == Origin.ESTIMATED
            assert picture.title.startswith("Estimated")
            assert any("nothing here was measured" in text for text in " ".join(texts(picture.svg)).split("; "))
        assert planned.part_table(plan).cells[-1][0] == "sum"

    def test_the_command_writes_it(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        arguments = ("explain", "efficientnet_b0", "--img-size", "64", "--html", tmp_path / "plan.html")
        assert run(capsys, *arguments)[0] == 0
        assert "estimated" in (tmp_path / "plan.html").read_text()
        status, _, err = run(capsys, *arguments)
        assert status == 2
        assert "--force overwrites it" in err
        status, _, err = run(capsys, *arguments, "--train")
        assert (status, "allowed: without --train" in err) == (2, True)


class TestOrigins:
    def test_a_page_takes_parts_of_its_own_origin_alone(self) -> None:
        page = Page("Title", Origin.MEASURED, [])
        page.add("Section", [Table("fine", ["a"], [["1"]], Origin.MEASURED)])
        for part in (Table("plan", ["a"], [["1"]], Origin.ESTIMATED), Picture("p", "plan", "", Origin.ESTIMATED)):
            with pytest.raises(ValueError, match="'plan' is estimated, and the page is of what was measured"):
                page.add("Section", [part])

    def test_no_table_of_the_pages_has_estimates_beside_measurements(self) -> None:
        report = Path(__file__).resolve().parents[1] / "benchmarks/results/REPORT.md"
        found = 0
        for page in (*PAGES, report):
            for head in re.findall(r"^(\|.*\|)\n\|[-:|]+\|$", page.read_text(encoding="utf-8"), re.MULTILINE):
                estimated = re.search(r"estimate|floor|planned", head, re.IGNORECASE)
                timed = re.search(r"measured|median|p95| ms\b", head, re.IGNORECASE)
                assert not (estimated and timed), f"{page.name}: {head}"
                found += 1
        assert found > 50


class TestCommand:
    def test_page_and_pictures(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        timing.append_rows(tmp_path / "rows.jsonl", rows())
        page, folder = tmp_path / "page.html", tmp_path / "pictures"
        arguments = ("report", tmp_path / "rows.jsonl", "--html", page, "--svg", folder)
        status, out, err = run(capsys, *arguments)
        assert (status, out) == (0, "")
        assert page.read_text() == measured.page(rows()).html()
        written = {file.stem for file in folder.iterdir()}
        assert written == {picture.name for picture in measured.all_pictures(rows())}
        assert err.count("report: ") == 1 + len(written)
        assert run(capsys, *arguments)[0] == 2
        assert run(capsys, *arguments, "--force")[0] == 0

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            ((), "nothing to write; allowed: --html FILE, --svg FOLDER or both"),
            (("--html", "page.txt"), "the name must end in one of .html, .htm"),
        ],
    )
    def test_mistakes(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path, more: tuple[str, ...], message: str
    ) -> None:
        timing.append_rows(tmp_path / "rows.jsonl", [make_row()])
        status, _, err = run(capsys, "report", tmp_path / "rows.jsonl", *more)
        assert status == 2
        assert message in err

    def test_files_that_cannot_be_read(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        (tmp_path / "empty.jsonl").write_text("")
        (tmp_path / "damaged.jsonl").write_text("{}\n")
        for name, message in (("empty", "no rows"), ("damaged", "not a result row"), ("missing", "No such file")):
            status, _, err = run(capsys, "report", tmp_path / f"{name}.jsonl", "--html", tmp_path / "page.html")
            assert status == 2
            assert message in err
