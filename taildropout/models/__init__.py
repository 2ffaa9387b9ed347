"""Dealing with someone else's model: calling it, putting layers into it, setting its width."""
