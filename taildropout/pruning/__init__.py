"""Changing the features of a network, exactly."""
