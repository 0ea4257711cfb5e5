"""The table of ``deltaops compare``: methods trained alike on labelled texts, and timed.

contenders   who takes part      reader   the model and the texts      learn    training, timing
store        the table on disk   report   as Markdown                  picture  as a picture
"""
