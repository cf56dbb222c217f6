"""The cache of torch.autocast, off inside units whose weights come and go.

It would hold the 16-bit cast of every weight until the end of the autocast context.
"""

from __future__ import annotations

import torch

__all__ = ["AutocastCache"]


class AutocastCache:
    """Told when the forward of a unit begins and ends, and how many are open then."""

    def __init__(self, device: torch.device) -> None:
        self._device_type = device.type
        self.saw_autocast = False
        # How many units were open when the cache was turned off; None: it is as the user has it.
        self._off_since: int | None = None

    def enter(self, open_count: int) -> None:
        """Off from here on, but only while autocast is on: no hook is called after Ctrl-C, and the end of that context
        then turns it on again."""
        if not torch.is_autocast_enabled(self._device_type):
            return
        self.saw_autocast = True
        if self._off_since is None and torch.is_autocast_cache_enabled():
            self._off_since = open_count
            torch.set_autocast_cache_enabled(False)

    def exit(self, open_count: int) -> None:
        """On again where the unit in which it was turned off has ended."""
        if self._off_since is not None and open_count < self._off_since:
            self._off_since = None
            torch.set_autocast_cache_enabled(True)

    def forget(self) -> None:
        """No unit is open; an exception may have left the context of autocast, which has turned it on."""
        if torch.is_autocast_enabled(self._device_type):
            self.exit(0)
        self._off_since = None
