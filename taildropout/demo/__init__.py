"""The command-line demonstration: train once on real images, choose the width, cut, check."""
