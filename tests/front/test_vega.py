"""The scripts of the report, which a machine keeps."""

from pathlib import Path

import pytest
import vl_convert

from clippo.front import vega


def anew(cache: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The scripts as another process that keeps what it can get again there would have them."""
    monkeypatch.setenv("CLIPPO_CACHE", str(cache))
    vega.bundle.cache_clear()
    return vega.bundle()


def test_they_are_put_together_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = anew(tmp_path / "cache", monkeypatch)
    assert "vegaEmbed" in first
    assert "</script" not in first
    (kept,) = (tmp_path / "cache").iterdir()
    assert kept.suffix == ".js"
    monkeypatch.delattr(vl_convert, "javascript_bundle")
    assert anew(tmp_path / "cache", monkeypatch) == first


def test_a_place_that_cannot_be_written_to_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    assert "vegaEmbed" in anew(tmp_path / "file" / "cache", monkeypatch)
    vega.bundle.cache_clear()
