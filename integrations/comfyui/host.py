"""What ComfyUI offers to nodes that take long: a bar, and the button that stops them."""

import sys


class Bar:
    """ComfyUI's progress bar; nothing where there is none."""

    def __init__(self):
        self._bar, self._total = None, 0

    def show(self, step: int, steps: int) -> None:
        """Show how far it is."""
        utils = sys.modules.get("comfy.utils")
        if utils is None or steps < 1:
            return
        if self._bar is None or self._total != steps:
            self._bar, self._total = utils.ProgressBar(steps), steps
        self._bar.update_absolute(step, steps)


def check_interrupted() -> None:
    """Raise ComfyUI's exception if the user has stopped the workflow."""
    management = sys.modules.get("comfy.model_management")
    if management is not None:
        management.throw_exception_if_processing_interrupted()
