"""Readings of ambiguous Chinese characters, streamed: the published g2pM network from weights to sessions."""
