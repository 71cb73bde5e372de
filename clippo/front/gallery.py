"""Pictures of the report with what models make of them, as HTML."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from clippo.evaluate.words import Words
from clippo.front.counts import REFERENCE
from clippo.front.front import PLACES


def gallery(examples: Sequence[Mapping[str, Any]], words: Words) -> str:
    """Pictures with what models said of them, or in the order of their rankings; nothing without pictures."""
    if not examples:
        return ""
    if PLACES in json.loads(examples[0]["predictions_json"]):
        return _rankings(examples, words)
    figures, right = "", Counter[str]()
    for row in examples:
        picture = base64.b64encode(row["picture"]).decode()
        said = ""
        for model, answer in json.loads(row["predictions_json"]).items():
            name = "untouched" if model == REFERENCE else model.replace("_", "-")
            right[name] += answer == row["label"]
            kinds = {row["label"]: "right", row["attack_word"]: "fooled"}
            kind = kinds.get(answer, "wrong")
            said += f"<li class='{kind}'><span>{escape(name)}</span> {escape(answer)} <em>{kind}</em></li>"
        word = row["attack_word"]
        seen = row["label"] + (f" with the word {word} on it" if word else "")
        figures += (
            f"<figure><img alt='{escape(seen)}' "
            f"src='data:{_media_type(row['picture'])};base64,{picture}'>"
            f"<figcaption><b>{escape(row['label'])}</b>{f', word: {escape(word)}' if word else ''}"
            f"<ul>{said}</ul></figcaption></figure>"
        )
    score = ", ".join(f"{escape(name)} {n}" for name, n in right.items())
    return (
        f"<section id='gallery'><h2>What the models say</h2><p>{escape(words.gallery)} "
        f"Right of {len(examples)}: {score}.</p><div class='gallery'>{figures}</div></section>"
    )


def _rankings(examples: Sequence[Mapping[str, Any]], words: Words) -> str:
    """The first pictures of some rankings, a row for each query and model."""
    rows: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for example in examples:
        picture, group = base64.b64encode(example["picture"]).decode(), escape(example["attack_word"])
        figure = (
            f"<figure><img alt='{group}' src='data:{_media_type(example['picture'])};base64,{picture}'>"
            f"<figcaption>{group}</figcaption></figure>"
        )
        for model, place in json.loads(example["predictions_json"])[PLACES].items():
            rows.setdefault((example["label"], model), []).append((place, figure))
    shown = ""
    for query, model in sorted(rows, key=lambda row: (row[0], row[1] != REFERENCE)):
        name = "untouched" if model == REFERENCE else model
        figures = "".join(figure for _, figure in sorted(rows[query, model]))
        shown += f"<h3>{escape(query)}: {escape(name)}</h3><div class='gallery ranking'>{figures}</div>"
    return f"<section id='gallery'><h2>What comes first</h2><p>{escape(words.gallery)}</p>{shown}</section>"


def _media_type(picture: bytes) -> str:
    """What kind of picture it is.

    >>> _media_type(b"RIFF....WEBP"), _media_type(bytes([137]) + b"PNG"), _media_type(bytes([255, 216]))
    ('image/webp', 'image/png', 'image/jpeg')
    """
    if picture[8:12] == b"WEBP":
        return "image/webp"
    return "image/png" if picture[1:4] == b"PNG" else "image/jpeg"
