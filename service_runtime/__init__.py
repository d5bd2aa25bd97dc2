"""What makes a process a service: settings, logs, traces, TLS, health."""
