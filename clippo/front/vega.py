"""The scripts that draw a page's charts, so that it asks the network for nothing."""

from __future__ import annotations

from contextlib import suppress
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import altair as alt
import vl_convert

from clippo.config import digest
from clippo.remote import node_cache
from clippo.results.objects import write_whole

# The version that Altair writes, as vl-convert names it.
VEGA_LITE = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
WANTED = "window.vegaEmbed = vegaEmbed;"  # a script; what it uses is put together with it


@lru_cache(maxsize=1)
def bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed. Putting them together takes a second, so a machine keeps them."""
    with suppress(OSError, RuntimeError):  # RuntimeError: a user without a home
        return _embeddable(_kept().read_text(encoding="utf-8"))
    script: str = vl_convert.javascript_bundle(WANTED, VEGA_LITE)
    with suppress(OSError, RuntimeError):  # as in a home that is read-only
        write_whole(_kept(), script.encode())
    return _embeddable(script)


def _kept() -> Path:
    return node_cache() / f"vega-{digest(WANTED, VEGA_LITE, metadata.version('vl-convert-python'))}.js"


def _embeddable(script: str) -> str:
    """Nothing in it ends the element that it stands in."""
    return script.replace("</script", "<\\/script")
