"""Keras 3 on the torch backend, with its LSTMs computed here.

::

    import lstmfused.keras

    lstmfused.keras.enable()

and Keras code as it stands runs fused, in training and inference: ``keras.layers.LSTM`` with all
its options, ``Bidirectional``, ``TimeDistributed``, ``LSTMCell`` stepped by hand,
``RNN(LSTMCell(...))`` and ``RNN([LSTMCell(...), ...])``. What cannot be served, say an LSTM with
another activation, goes Keras's own way; :func:`report` tells why.

Nothing of a model changes but who computes it: configs, saved files, clones and the streams of
seeds are Keras's own, and load without this package.
"""

from . import supported  # noqa: F401, before Keras is used
from .hooks import disable, enable, fuse, report, unfuse

__all__ = ["disable", "enable", "fuse", "report", "unfuse"]
