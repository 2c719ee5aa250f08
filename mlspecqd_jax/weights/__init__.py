"""Weights in few bits: how they are cast, laid out for a chip, and split over devices."""
