"""HGRN2 over sequences that context-parallel ranks share."""
