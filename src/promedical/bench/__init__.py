"""The bench: metrics, agreement between physicians, null graders, and the one evaluation call."""
