"""Calibration data: samples from files, folders and tables, made into batches of model inputs."""
