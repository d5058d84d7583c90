"""Policies that decide what a step computes. Pure: a policy sees its queue and the clock it is given."""

SCHEDULERS = {
    "sarathi": "rayserve_sarathi.scheduling.sarathi:SarathiScheduler",
}
