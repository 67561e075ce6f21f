"""The schedules, one idea a file; `zeropipe.runtime.pipe.schedule` is the way in."""
