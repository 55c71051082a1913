"""Context parallelism of HGRN2: the operator over sequences that are split over several ranks."""
