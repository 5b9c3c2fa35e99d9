"""Where the captions of pictures are, in a folder or in the columns of a table."""
from lorabook.captions.find import Captions, find_captions, image_files, names_images, text_beside  # noqa: F401
from lorabook.captions.words import as_caption, find_caption_column, first_line, some  # noqa: F401
