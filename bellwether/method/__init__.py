"""The mathematics of federated learning: arrays in, arrays out."""
