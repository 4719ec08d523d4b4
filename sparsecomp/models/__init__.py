"""Models and batches: layers, blocks, channels, and the Gram matrix of each input. Knows no pattern and no kernel."""
