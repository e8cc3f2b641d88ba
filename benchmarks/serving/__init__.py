"""The HTTP service: what it adds to a request, admission under load beside a plain server, and faults."""
