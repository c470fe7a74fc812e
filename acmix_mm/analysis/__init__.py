"""What is computed about models: costs, time and memory, comparison runs.

Needs mmengine, and mmdet for its detectors; not imported by ``import acmix_mm``.
"""
