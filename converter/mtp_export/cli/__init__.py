"""The command line: the only package that imports export, calibration and runtime."""
