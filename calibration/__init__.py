"""Calibration data, observers and Q/DQ placement."""
