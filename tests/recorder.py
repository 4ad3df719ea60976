"""A backend of one process that computes nothing, to see what the training loop asks of one."""

from contextlib import contextmanager

from flax_diffusion.core.backend import Described


class Idle:
    """Implements of `core.backend.Backend` what needs no state; a test adds what it looks at."""

    command, process_index, process_count, device_count = "train", 0, 1, 1

    def init_state(self):
        return 1

    def describe(self):
        return Described("nothing", 0, compiles=False)

    def read(self, metrics):
        return metrics

    def state_bytes(self):
        return 0

    def wait(self):
        pass

    def all_processes(self, condition):
        return condition

    def broadcast_from_first(self, value):
        return value

    def should_stop(self, requested, step):
        return requested

    def check(self, folder):
        pass

    def validation_loss(self, average):
        return lambda batch: {"loss": 1.0}

    def release(self, name):
        pass

    @contextmanager
    def profiled(self, folder):
        yield
        (folder / "recording").touch()
