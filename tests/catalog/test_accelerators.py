import csv
import math
from pathlib import Path

import pytest

from waterline import catalog
from waterline.catalog import accelerators, naming
from waterline.errors import UnknownNameError
from waterline.hardware import Gpu
from waterline.units import GIGA, MIB, TERA

COLLECTED = Path(__file__).parents[2].parent / "shared" / "data" / "accelerators.csv"
needs_collected = pytest.mark.skipif(not COLLECTED.exists(), reason="the collected data is not beside the checkout")

# total processing performance as published with the export rules and in the cards' datasheets
PUBLISHED_TPP = {"a100-sxm-80g": 4992, "rtx-4090": 5285, "rtx-4090d": 4707, "h20-96g": 2368, "h100-sxm-80g": 15832}
BITS = {"fp32": 32, "tf32": 32, "fp16": 16, "bf16": 16, "fp8": 8, "int8": 8, "fp4": 4, "fp16_acc16": 16, "fp8_acc16": 8}


def recomputed_tpp(gpu: Gpu) -> float:
    return max(rate / TERA * BITS[precision] for precision, rate in gpu.flops_per_s.items())


def collected() -> list[dict[str, str]]:
    if not COLLECTED.exists():
        return []
    with COLLECTED.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("gpu", "published"), PUBLISHED_TPP.items())
def test_dense_rates_give_the_published_processing_performance(gpu: str, published: float) -> None:
    assert recomputed_tpp(catalog.gpus()[gpu]) == pytest.approx(published, rel=1e-3)


@pytest.mark.parametrize("gpu", [gpu for gpu in catalog.gpus().values() if gpu.tpp], ids=lambda gpu: gpu.id)
def test_the_stated_processing_performance_follows_from_the_rates(gpu: Gpu) -> None:
    assert gpu.tpp == pytest.approx(recomputed_tpp(gpu), rel=5e-3)


def test_there_are_77_accelerators_and_the_processor_of_this_machine() -> None:
    assert len(catalog.gpus()) == 78
    assert [gpu.id for gpu in catalog.gpus().values() if gpu.vendor == "cpu"] == ["cpu"]
    assert {gpu.vendor for gpu in list(catalog.gpus().values())[:63]} == {"nvidia", "amd"}


@pytest.mark.parametrize("gpu", catalog.gpus().values(), ids=lambda gpu: gpu.id)
def test_every_entry_is_usable_and_has_a_source(gpu: Gpu) -> None:
    assert gpu.memory_bytes > 0
    assert gpu.memory_bytes_per_s > 0
    assert gpu.flops_per_s
    assert all(rate > 0 for rate in gpu.flops_per_s.values())
    assert gpu.gpus_per_node >= 1
    assert gpu.support in {"full", "planning"}
    assert gpu.source
    assert gpu.read >= "2026-01-01"
    assert gpu.link.pair_bytes_per_s <= gpu.link.bytes_per_s


@needs_collected
@pytest.mark.parametrize("row", collected(), ids=lambda row: row["id"])
def test_every_figure_equals_the_collected_one(row: dict[str, str]) -> None:
    gpu = catalog.gpus()[row["id"]]
    rates = {
        rate: float(row[column]) * TERA
        for rate in BITS
        if row[column := "tops_int8" if rate == "int8" else f"tflops_{rate}"]
    }
    assert gpu.flops_per_s == pytest.approx(rates)
    assert gpu.memory_bytes / MIB / 1024 == pytest.approx(float(row["memory_gib_usable"]), abs=0.0051)
    assert gpu.memory_bytes_per_s == float(row["memory_bandwidth_gb_s"]) * GIGA
    for ours, theirs, scale in (
        (gpu.tdp_watts, "tdp_w", 1),
        (gpu.link.bytes_per_s, "link_gb_s_per_gpu_uni", GIGA),
        (gpu.link.pair_bytes_per_s, "link_gb_s_pair_uni", GIGA),
        (gpu.pcie_bytes_per_s, "pcie_gb_s_uni", GIGA),
        (gpu.gpus_per_node, "gpus_per_node", 1),
        (gpu.release_year, "release_year", 1),
        (gpu.msrp_usd, "msrp_usd", 1),
        (gpu.tpp, "bis_tpp", 1),
        (gpu.die_mm2, "die_mm2", 1),
    ):
        if row[theirs]:
            assert ours is not None
            assert math.isclose(ours, float(row[theirs]) * scale), theirs
    assert (gpu.name, gpu.vendor, gpu.architecture) == (row["name"], row["vendor"], row["arch"])
    assert (gpu.stack, gpu.support, gpu.target) == (row["stack"], row["support"], row["cc_or_gfx"])
    assert (gpu.link.kind, gpu.link.topology) == (row["link"], row["link_topology"])
    if row["uncertain"] or "!=" in row["crosscheck"]:
        assert gpu.doubtful


def test_doubtful_cells_name_a_key_of_the_table() -> None:
    keys = set(accelerators._Entry.__struct_fields__)
    for gpu in catalog.gpus().values():
        for text in gpu.doubtful:
            key, _, rate = text.partition(":")[0].partition(".")
            assert key in keys, (gpu.id, text)
            assert not rate or rate in BITS, (gpu.id, text)


@pytest.mark.parametrize("gpu", catalog.gpus().values(), ids=lambda gpu: gpu.id)
def test_every_id_name_and_alias_means_one_card(gpu: Gpu) -> None:
    for name in (gpu.id, gpu.name, gpu.id.upper(), f"{gpu.vendor} {gpu.name}", *gpu.aliases):
        assert catalog.find_gpu(name).id == gpu.id
        assert naming.called(name, accelerators.names()) == [gpu.id]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("4090", "rtx-4090"),
        ("RTX 4090", "rtx-4090"),
        ("rtx4090", "rtx-4090"),
        ("geforce rtx 4090", "rtx-4090"),
        ("4090 24GB", "rtx-4090"),
        ("MI300X", "mi300x"),
        ("Instinct MI300X", "mi300x"),
        ("h100 sxm", "h100-sxm-80g"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm-80g"),
        ("A100-SXM4-80GB", "a100-sxm-80g"),
        ("A100 SXM 80 GB", "a100-sxm-80g"),
        ("4060ti 16gb", "rtx-4060ti-16g"),
        ("7900 xtx", "rx-7900xtx"),
        ("strix halo", "strix-halo-8060s"),
        ("rtx 3060", "rtx-3060-12g"),
        ("rtx 4060", "rtx-4060-8g"),
    ],
)
def test_cards_are_found_by_the_names_people_type(typed: str, meant: str) -> None:
    assert catalog.find_gpu(typed).id == meant


@pytest.mark.parametrize(
    ("typed", "candidates"),
    [
        ("h100", ["h100-pcie-80g", "h100-sxm-80g", "h100-nvl-94g"]),
        ("A100 80GB", ["a100-pcie-80g", "a100-sxm-80g"]),
        ("4060 ti", ["rtx-4060ti-8g", "rtx-4060ti-16g"]),
        ("mi50", ["mi50-16g", "mi50-32g"]),
    ],
)
def test_a_name_of_several_cards_lists_them(typed: str, candidates: list[str]) -> None:
    with pytest.raises(UnknownNameError, match=", ".join(candidates)):
        catalog.find_gpu(typed)


@pytest.mark.parametrize(
    ("typed", "offered"), [("rtx-4095", "rtx-4090"), ("mi300y", "mi300x"), ("hl00-sxm", "h100-sxm")]
)
def test_a_misspelt_card_offers_the_nearest(typed: str, offered: str) -> None:
    with pytest.raises(UnknownNameError, match=f"Did you mean .*{offered}"):
        catalog.find_gpu(typed)


@pytest.mark.parametrize("typed", ["", " ", "---", "x" * 5000, "rtx 5090 ti", "kpu", "\0", "é"])
def test_what_is_no_card_is_refused(typed: str) -> None:
    with pytest.raises(UnknownNameError, match="no GPU is called"):
        catalog.find_gpu(typed)
