"""Cost models: predicted latency and energy of a format on a target."""
