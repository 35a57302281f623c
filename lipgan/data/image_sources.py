"""Images wherever they lie: in a folder, an archive, shards or tables, as one kind of collection."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lipgan.data.image_archives import archived_images
from lipgan.data.image_shards import sharded_images
from lipgan.data.image_tables import TableImages
from lipgan.data.images import Images, find_images

__all__ = ["open_images"]


@contextmanager
def open_images(name: str, left_out: Counter[str] | None = None) -> Iterator[Images]:
    """The images in a folder, or in files whose name ends in .zip, .tar or .parquet, for as long as the context lasts.

    Args:
        name: of the folder or file; of several .tar or .parquet files, with braces.
        left_out: gets the numbers of files of other kinds, as of :func:`lipgan.data.images.find_images`.

    Raises:
        ValueError, OSError: as :func:`~lipgan.data.images.find_images`,
            :func:`~lipgan.data.image_archives.archived_images`, :func:`~lipgan.data.image_shards.sharded_images` and
            :class:`~lipgan.data.image_tables.TableImages`.
    """
    suffix = Path(name).suffix
    if Path(name).is_dir():
        yield find_images(name, left_out)
    elif suffix == ".zip":
        with archived_images(name, left_out) as images:
            yield images
    elif suffix == ".tar":
        yield sharded_images(name, left_out)
    elif suffix == ".parquet":
        yield TableImages(name)
    else:
        raise ValueError(f"{name} is neither a folder of images nor a .zip, .tar or .parquet file of them")
