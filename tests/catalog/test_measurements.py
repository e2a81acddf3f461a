from pathlib import Path

import numpy as np
import pytest

from waterline import catalog
from waterline.catalog.measurements import Measured, measured_gpus, measured_kernels, read_kernels, write_kernels
from waterline.cost.kernels_curves import CURVES

PROVENANCE = {"source": "made up", "licence": "none", "version": "0", "read": "2026-11-23"}
FILE = Path(catalog.__file__).parent / "measured" / "kernels.npz"


def test_what_is_written_is_read_within_its_rounding(tmp_path: Path) -> None:
    correction = np.random.default_rng(1).normal(0, 0.5, (3, 4, 5))
    fit = {
        "gemm/bf16": Measured(correction, {"tokens": (1.0, 8192.0)}),
        "decode/fp8": Measured(-2 * correction, {"rows": (1.0, 64.0)}),
    }
    write_kernels(tmp_path / "fit.npz", PROVENANCE, {"a": fit})
    found = read_kernels(tmp_path / "fit.npz", "a")
    assert list(found) == ["gemm/bf16", "decode/fp8"]
    for name, one in found.items():
        rounding = max(0.01, np.abs(fit[name].correction).max() / 127) / 2
        assert np.abs(one.correction - fit[name].correction).max() <= rounding + 1e-9
        assert one.measured == fit[name].measured
    assert read_kernels(tmp_path / "fit.npz", "c") == {}


def test_the_file_that_ships_is_small_and_fits_the_grids() -> None:
    assert FILE.stat().st_size <= 200_000
    assert len(measured_gpus()) == 6
    for gpu in measured_gpus():
        assert catalog.find_gpu(gpu).id == gpu
        for name, fit in measured_kernels(gpu).items():
            curve = CURVES[name.split("/")[0]]
            assert fit.correction.shape == curve.shape
            assert list(fit.measured) == list(curve.sizes)


def test_a_card_nobody_measured_has_no_measurements() -> None:
    assert measured_kernels("rtx-4090") == {}
    with pytest.raises(FileNotFoundError):
        read_kernels(Path("absent.npz"), "l40s")
