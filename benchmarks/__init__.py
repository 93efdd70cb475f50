"""One LSTM step measured against its peers: ``python -m benchmarks --help``."""
