"""The forms of adapter files: recognised by their keys, read into one neutral form, and written."""
