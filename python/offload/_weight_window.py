"""WeightWindow: which residencies have bytes on the device, and every change of that.

One is away, on its way or ready. Whatever is not ready wears `PendingParameter` and cannot be read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from ._errors import OffloadError
from ._residency import Residency
from ._stored_values import StoredWeight

__all__ = ["WeightStore", "WeightWindow"]


class WeightStore(Protocol):
    """What moves the bytes and knows the updates: the engine."""

    def reserve(self, residencies: Sequence[Residency], more_bytes: int) -> Iterator[list[Residency]]:
        """The residencies in runs, each when there is room for its host bytes; for `more_bytes` at the end too."""

    def give_host_bytes(self, residency: Residency) -> None:
        """The residency has host bytes, for values that it writes there next."""

    def in_memory_first(self, residencies: Sequence[Residency]) -> Sequence[Residency]:
        """In the order in which they go home after an error."""

    def take_host_bytes_back(self, residency: Residency) -> None:
        """They are not needed any more."""

    def hold(self, residency: Residency, *, for_writing: bool = False) -> None:
        """Its host bytes are in memory, and current, until those of another one are asked for.

        Raises `StorageError` when they cannot be read.
        """

    def hold_or_lose(self, residency: Residency) -> None:
        """As hold() after a failure: what cannot be read is NaN."""

    def stored_weight(self, residency: Residency, parameter: Parameter) -> StoredWeight | None:
        """Its present value on disk, for who reads it before it changes; None: it is in memory all the time."""

    def expect(self, coming: Callable[[], Iterable[Residency]]) -> None:
        """Their host bytes are needed in this order next, as far as it is known."""

    def read_ahead(self) -> None:
        """Sends for host bytes in that order."""

    def no_upload(self) -> Any:
        """For start_weights(), which makes it an upload; until then it has ended."""

    def start_weights(self, residency: Residency, upload: Any) -> None:
        """Starts the upload, behind the updates of its parameters, in order with the compute stream.

        It is `upload` from then on, with nothing in between that a signal could tear.
        """

    def wait_weights(self, residency: Residency, upload: Any) -> None:
        """The compute stream, whichever it is by now, may use what start_weights() started; raises its error."""

    def abandon_weights(self, residency: Residency, upload: Any) -> None:
        """The stream that their memory goes back to waits for what start_weights() started; raises its error."""

    def settle_updates(self, parameters: Collection[Parameter]) -> None:
        """The updates of these parameters have ended afterwards; raises their error."""

    def follow_updates(self, parameters: Collection[Parameter]) -> None:
        """As settle_updates(), where an upload behind them does not wait for them by itself."""

    def weight_written(self, parameter: Parameter, on_host: Tensor) -> None:
        """Somebody wrote to the parameter, which is on the device: `on_host` is to be equal afterwards."""

    def name_of(self, parameter: Tensor) -> str: ...


class WeightWindow:
    """See the module's text. One compute thread at a time, as autograd gives it."""

    def __init__(self, store: WeightStore, *, poison: bool) -> None:
        self._store = store
        self._poison = poison
        # Those with bytes on the device, and what their upload must be waited for; None: ready.
        self._uploads: dict[Residency, Any] = {}
        # Called before what the user wrote to a weight replaces its host bytes.
        self.before_write_back: Callable[[], None] | None = None
        self.peak_bytes = 0
        # The last upload of each, which may still read the host bytes and write to the device's.
        self.last_upload: dict[Residency, Any] = {}

    def __contains__(self, residency: Residency) -> bool:
        return residency in self._uploads

    @property
    def device_bytes(self) -> int:
        nbytes = 0
        for residency in self._uploads:
            nbytes += residency.nbytes
        return nbytes

    def is_ready(self, residency: Residency) -> bool:
        return self._uploads.get(residency, self) is None

    def bring(self, residencies: Iterable[Residency]) -> None:
        """Sends for those that are not on the device."""
        for residency in residencies:
            if residency in self._uploads or not residency.is_placed:
                continue
            upload = self.last_upload.get(residency)
            if upload is None:
                upload = self.last_upload[residency] = self._store.no_upload()
            residency.allocate(poison=self._poison)
            try:
                self._store.start_weights(residency, upload)
                self._uploads[residency] = upload
            except BaseException:
                if residency not in self._uploads:
                    self._await_quietly(residency)  # it may have started
                    residency.free()
                raise
            nbytes = self.device_bytes
            if nbytes > self.peak_bytes:
                self.peak_bytes = nbytes

    def make_ready(self, residencies: Iterable[Residency]) -> None:
        """Those of them that are on their way can be computed with afterwards."""
        for residency in residencies:
            upload = self._uploads.get(residency, self)
            if upload is self:  # it is away
                continue
            if upload is None:  # for the stream that it was made ready on
                self._store.wait_weights(residency, self.last_upload[residency])
                continue
            try:
                self._store.follow_updates(residency.parameters)
                self._store.wait_weights(residency, upload)
            except BaseException:
                self._free(residency)  # the next touch sends for it again
                raise
            # Interrupted here, all of it is done again.
            residency.show()
            residency.mark_equal()
            self._uploads[residency] = None

    def free_all_but(self, kept: Collection[Residency]) -> None:
        for residency in [residency for residency in self._uploads if residency not in kept]:
            self._free(residency)

    def forget(self, residency: Residency) -> None:
        """Its parameters are about to become plain ones with other memory."""
        self._await_quietly(residency)
        self._uploads.pop(residency, None)
        residency.show()

    def flush(self) -> None:
        """What the user wrote to parameters on the device is on the host afterwards."""
        for residency, upload in self._uploads.items():
            if upload is None:
                self.write_back(residency, residency.written())

    def write_back(self, residency: Residency, parameters: Collection[Parameter]) -> None:
        """The host bytes of these parameters, which are ready, become equal to those on the device."""
        if not parameters:
            return
        if self.before_write_back is not None:
            self.before_write_back()
        self._store.settle_updates(residency.parameters)
        self._store.hold(residency, for_writing=True)
        residency.mark_different()  # what an error leaves undone is done by whoever comes next
        with torch.no_grad():
            for parameter in parameters:
                residency.take_home(parameter, self._store.name_of(parameter))
                self._store.weight_written(parameter, residency.on_host(parameter))
        residency.mark_equal()

    def hide(self, residency: Residency) -> None:
        """What is ready is so no more, its bytes are still there: the next touch or read makes it ready."""
        written = residency.written()
        if written:
            self.write_back(residency, written)
        self._uploads[residency] = self.last_upload[residency]
        residency.hide()

    def _free(self, residency: Residency) -> None:
        if self._uploads[residency] is None:
            self.hide(residency)
        else:
            self._await_quietly(residency)  # it writes to the memory
            residency.hide()  # Ctrl-C may have come before that of hide()
        del self._uploads[residency]  # from here on it is sent for again
        residency.free()

    def _await_quietly(self, residency: Residency) -> None:
        upload = self.last_upload.get(residency)
        if upload is not None and not upload.done:
            with contextlib.suppress(OffloadError):  # whoever asks for the weights is told
                self._store.abandon_weights(residency, upload)
