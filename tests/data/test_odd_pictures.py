"""Pictures of odd kinds, over two hundred: each is read to its pixels, or refused in one line with kind and fix."""

import re
import warnings

import numpy as np
import odd_pictures
import pytest

from flax_diffusion.core.data.images.decoding import check_header, decode
from flax_diffusion.core.data.sources.source import Record
from flax_diffusion.core.errors import DataError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Pillow's, of modes that NumPy's arrays do not tell
    PICTURES = {name: (data, expected) for family in odd_pictures.FAMILIES for name, data, expected in family()}


def test_two_hundred_at_least():
    assert len(PICTURES) >= 200
    assert len(PICTURES) == sum(1 for family in odd_pictures.FAMILIES for _ in family())


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", PICTURES)
def test_read_or_refused(tmp_path, name):
    """From bytes and from a file, of which the extension says nothing."""
    data, expected = PICTURES[name]
    file = tmp_path / "picture.gif"
    file.write_bytes(data)
    for record in (Record(data, None, "picture"), Record(file, None, "picture")):
        if isinstance(expected, str):
            with pytest.raises(DataError, match=f"^picture .*{expected}") as caught:
                decode(record)
            assert "\n" not in str(caught.value)
            assert re.search(r"; (replace|remove|restore|scale|convert)", str(caught.value))
        else:
            check_header(record)
            image = decode(record)
            assert image.mode == "RGB"
            np.testing.assert_array_equal(np.asarray(image), expected)
