"""The forms that adapter files come in: recognised by their keys, read into one neutral form, and written again."""
