"""What a run will need before anything is booked: memory, time, money; and which strategy is the cheapest that fits."""

from gptdist.plan.planner import Plan, make_plan, suggest

__all__ = ["Plan", "make_plan", "suggest"]
