"""Arrow arrays from values and back, without pandas.

pyarrow imports pandas, where it is installed, to take a value from Python or to give it an array. That lasts
as long as to read tens of thousands of trials; buffers go without.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray


def texts(values: Sequence[str]) -> pa.Array:
    """An array of texts."""
    encoded = [value.encode() for value in values]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    return pa.StringArray.from_buffers(len(values), pa.py_buffer(ends), pa.py_buffer(b"".join(encoded)))


def repeated(text: str, length: int) -> pa.Array:
    """One text, so many times."""
    zeros = pa.Array.from_buffers(pa.int32(), length, [None, pa.py_buffer(bytes(4 * length))])
    return texts([text]).take(zeros)


def booleans(values: NDArray[np.bool_]) -> pa.Array:
    """A mask for ``Table.filter``."""
    bits = np.packbits(values, bitorder="little")
    return pa.Array.from_buffers(pa.bool_(), len(values), [None, pa.py_buffer(bits)])


def numbers(column: pa.Array | pa.ChunkedArray) -> NDArray[Any]:
    """A column of numbers, none of them null, as an array."""
    if isinstance(column, pa.Array):
        return np.from_dlpack(column)
    found = [np.from_dlpack(chunk) for chunk in column.chunks]
    return np.concatenate(found) if found else np.zeros(0, dtype=column.type.to_pandas_dtype())


def flags(mask: pa.ChunkedArray) -> NDArray[np.bool_]:
    """A mask without nulls as an array."""
    return numbers(mask.cast(pa.uint8())).astype(np.bool_)


def is_in(column: pa.ChunkedArray, values: Sequence[Any]) -> pa.ChunkedArray:
    """Which entries are among some values; of a dictionary column, each distinct text is looked at once."""
    wanted = texts(values) if all(isinstance(value, str) for value in values) else pa.array(list(values))
    if not pa.types.is_dictionary(column.type):
        return pc.is_in(column, wanted)
    masks, seen = [], texts([])
    found = pc.is_in(seen, wanted)
    for chunk in column.chunks:
        if not chunk.dictionary.equals(seen):  # neighbouring chunks often have the same
            seen, found = chunk.dictionary, pc.is_in(chunk.dictionary, wanted)
        masks.append(found.take(chunk.indices))
    return pa.chunked_array(masks, pa.bool_())
