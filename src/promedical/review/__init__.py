"""Physicians in the loop: rubric rounds and double-blind adjudication, as a web application."""
