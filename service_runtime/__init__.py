"""The common parts of every service process: settings, logs, traces, TLS, health, supervision."""
