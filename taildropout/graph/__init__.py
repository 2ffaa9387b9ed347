"""What `torch.export` says of a model: its dataflow, and which features can go from it."""
