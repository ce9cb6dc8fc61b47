"""The embedded default: a small model, a small encoder and a demo corpus that need no model hub."""
