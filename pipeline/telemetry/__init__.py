"""Logs, redaction, terminal output, counters, Prometheus metrics and stall detection."""
