"""From instructions to graded data: rubrics, degraded responses, checks on the sides."""
