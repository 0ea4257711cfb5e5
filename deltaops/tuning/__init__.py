"""Tuning a model: read data, train a delta, resume exactly, keep the files whole.

    read → tokens → loop ⇄ state → run

``run`` holds the story, ``loop`` the training steps, ``state`` what is needed to go on with the
same bits. Nothing here is imported by ``import deltaops``.
"""
