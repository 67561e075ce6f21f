"""The class that clients test for: every optimizer that ``initialize`` returns is one of these."""


class DeepSpeedOptimizer:
    """Marks an optimizer whose step is a whole, distributed update. It holds no state of its own."""
