"""Research jobs on GPUs nobody else needs: their work, what of it is saved, and what is lost when they must yield.

A run does work that counts from one load time after its start. It saves what it has done every `checkpoint_every_s`,
and once more when it is told to stop; how long that takes nobody has said, so it is taken to be as long as to load.
When its tenant's grace is shorter than that, it is stopped before it has saved, and what it did since its last
checkpoint will be done again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from waterline.fleet import Job
from waterline.rehearsal.record import JobRecord
from waterline.units import HOUR_S


@dataclass(slots=True, kw_only=True)
class Work:
    """One run of a job, from the moment it has its GPUs; times in seconds."""

    job: Job
    began_s: float
    saved_s: float = field(init=False)  # up to when its work is safe
    stopped_s: float | None = None  # when it was told to stop, and works no more

    def __post_init__(self) -> None:
        self.saved_s = self.useful_s

    @property
    def useful_s(self) -> float:
        """When its work begins to count."""
        return self.began_s + self.job.load_s

    @property
    def next_save_s(self) -> float:
        return self.saved_s + self.job.checkpoint_every_s

    def gone_s(self, now_s: float, grace_s: float) -> float:
        """Tell it to stop, and return when its GPUs are free."""
        self.stopped_s = now_s
        if grace_s < self.job.load_s:  # it cannot save in time
            return now_s + grace_s
        self.saved_s = max(self.saved_s, now_s)
        return now_s + self.job.load_s


class Books:
    """What jobs came to."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = {job.name: job for job in jobs}
        self.kept_s, self.lost_s, self.stops = (dict.fromkeys(self.jobs, 0.0) for _ in range(3))

    def end(self, work: Work, now_s: float, *, stopped: bool) -> None:
        """Write down a run that is over; at the end of the rehearsal, one that goes on."""
        name, until_s = work.job.name, work.stopped_s if work.stopped_s is not None else now_s
        safe_s = min(work.saved_s, until_s) if stopped else until_s
        self.kept_s[name] += max(0.0, safe_s - work.useful_s)
        self.lost_s[name] += max(0.0, until_s - max(safe_s, work.useful_s)) + min(until_s, work.useful_s) - work.began_s
        self.stops[name] += stopped

    def records(self) -> tuple[JobRecord, ...]:
        return tuple(
            JobRecord(
                job=name,
                tenant=job.tenant,
                gpu_hours=self.kept_s[name] * job.gpus / HOUR_S,
                lost_gpu_hours=self.lost_s[name] * job.gpus / HOUR_S,
                stops=int(self.stops[name]),
            )
            for name, job in self.jobs.items()
        )
