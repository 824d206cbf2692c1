"""deepspeed.runtime.lr_schedules: names that may stand in "scheduler.type" of a config."""

from .. import _refusal

LR_RANGE_TEST = "LRRangeTest"
ONE_CYCLE = "OneCycle"
WARMUP_LR = "WarmupLR"
WARMUP_DECAY_LR = "WarmupDecayLR"
WARMUP_COSINE_LR = "WarmupCosineLR"
# accelerate compares the class names of schedulers with these.
VALID_LR_SCHEDULES = [LR_RANGE_TEST, ONE_CYCLE, WARMUP_LR, WARMUP_DECAY_LR, WARMUP_COSINE_LR]

IN_CONFIG = (
    'name it in the config ("scheduler": {"type": ..., "params": ...}), or pass a scheduler of'
    " torch.optim.lr_scheduler to initialize"
)
LRRangeTest = _refusal.refused("deepspeed.runtime.lr_schedules.LRRangeTest", IN_CONFIG)
OneCycle = _refusal.refused("deepspeed.runtime.lr_schedules.OneCycle", IN_CONFIG)
WarmupLR = _refusal.refused("deepspeed.runtime.lr_schedules.WarmupLR", IN_CONFIG)
WarmupDecayLR = _refusal.refused("deepspeed.runtime.lr_schedules.WarmupDecayLR", IN_CONFIG)
WarmupCosineLR = _refusal.refused("deepspeed.runtime.lr_schedules.WarmupCosineLR", IN_CONFIG)

__getattr__ = _refusal.missing_attributes("deepspeed.runtime.lr_schedules")
