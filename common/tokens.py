"""The mark that stands for an image in a text, for all but the files of an exported folder, which stand alone."""

IMAGE_TOKEN = "<image>"
