"""Contenders' processes. All but `plain` are scripts that run in interpreters where this package is not installed."""
