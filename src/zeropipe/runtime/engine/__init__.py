"""The training engine: what it is made of and how it is put together; `zeropipe.runtime.engine.DeepSpeedEngine`."""

from zeropipe.runtime.engine.engine import DeepSpeedEngine as DeepSpeedEngine
