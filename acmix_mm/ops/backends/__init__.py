"""Implementations of the operators, one file each behind the signature that the front calls."""
