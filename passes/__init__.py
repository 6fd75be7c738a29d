"""FX passes: capture, normalize, rewrite; every pass copies, logs and verifies."""
