"""The scripts that draw a page's charts, so that it asks the network for nothing."""

from __future__ import annotations

import uuid
from contextlib import suppress
from functools import lru_cache
from importlib import metadata

import altair as alt
import vl_convert

from clippo.remote import node_cache


@lru_cache(maxsize=1)
def bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed. Putting them together takes a second, so a machine keeps them."""
    # The version that Altair writes, as vl-convert names it.
    version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    kept = node_cache() / f"vega-embed-{version}-{metadata.version('vl-convert-python')}.js"
    with suppress(OSError):
        return kept.read_text(encoding="utf-8")
    script: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", version)
    script = script.replace("</script", "<\\/script")
    with suppress(OSError):  # as in a home that is read-only
        kept.parent.mkdir(parents=True, exist_ok=True)
        temporary = kept.with_name(f".{kept.name}.{uuid.uuid4().hex}.tmp")
        temporary.write_text(script, encoding="utf-8")
        temporary.replace(kept)
    return script
